"""Reads configuration files and overrides into one checked `Deployment`.

The dataclasses in `schema` are the schema and hold every default. Nothing here starts a process or opens a connection.
"""
