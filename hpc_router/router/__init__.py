"""The router: a supervisor, one control process, and workers that serve requests."""
