"""The agent: it owns the replica's port, supervises the engine, and drains when the job is about to end."""
