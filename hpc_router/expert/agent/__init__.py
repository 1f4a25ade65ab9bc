"""The agent: it owns the replica's port, supervises the engine, and drains before the job ends."""
