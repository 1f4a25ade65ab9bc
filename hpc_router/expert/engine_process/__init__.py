"""The engine as a process group of its own, which ends with its agent whatever happens."""
