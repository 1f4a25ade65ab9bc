"""Addresses, tokens, and the HTTP contract between the processes of a deployment."""
