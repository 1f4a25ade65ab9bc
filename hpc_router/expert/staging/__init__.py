"""Copies models to the node's own disk, and keeps compile caches there."""
