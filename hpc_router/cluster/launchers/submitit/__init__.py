"""All code that is specific to submitit. Only `process` imports submitit, in a process of its own."""
