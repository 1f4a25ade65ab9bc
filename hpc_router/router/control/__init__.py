"""The control process: discovery, probes, settings, status and metrics, once for all workers."""
