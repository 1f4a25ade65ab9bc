"""Slurm: batch scripts, queues, nodes, and what its refusals mean."""
