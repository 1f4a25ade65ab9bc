"""Engines on several nodes: rank 0 leads, the other ranks follow."""
