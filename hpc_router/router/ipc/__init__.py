"""Communication between supervisor, control process and workers: typed messages, and counters in shared memory."""
