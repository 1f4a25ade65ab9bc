"""Copies of models on the node's own disk, and the compile caches that are kept there."""
