"""The control process: registry, probes, metrics, and what the workers are told."""
