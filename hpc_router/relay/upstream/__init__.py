"""Connections to upstream servers: requests out, responses in."""
