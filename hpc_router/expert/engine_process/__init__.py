"""The engine as a process group of its own, which always ends with its agent."""
