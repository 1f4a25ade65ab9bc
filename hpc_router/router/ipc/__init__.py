"""Communication between the supervisor, the control process and the workers: typed messages, and counters in shared
memory."""
