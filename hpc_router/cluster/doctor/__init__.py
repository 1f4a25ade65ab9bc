"""The command `hpc-router doctor`, which checks a site from this machine and from a short job on a node."""
