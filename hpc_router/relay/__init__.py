"""Relays one request and its response between two connections, bytes unchanged.

`downstream` is the client's side, `upstream` the replica's side. Neither knows experts, replicas or policies.
"""
