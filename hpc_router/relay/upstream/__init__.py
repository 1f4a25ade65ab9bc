"""Connections to upstream servers: the replicas' agents, or an agent's engine."""
