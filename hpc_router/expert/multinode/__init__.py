"""Engines on several nodes: rank 0 leads, and the other ranks follow its orders."""
