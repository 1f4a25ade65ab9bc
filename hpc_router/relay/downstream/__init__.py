"""Connections of clients: the server reads their requests and writes the responses."""
