"""The router process: one endpoint in front of all experts."""
