"""Everything that is particular to submitit: only `process` imports it, in a process of its own."""
