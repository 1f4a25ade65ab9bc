"""Slurm: builds batch scripts, reads queues and nodes, and explains what refusals and pending reasons mean."""
