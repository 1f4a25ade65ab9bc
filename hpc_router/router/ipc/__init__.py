"""How supervisor, control process and workers talk: pipes, messages, and counters in shared memory."""
