"""The replicas of each expert as one process sees them: their states, load and queues, and the choice of a replica.

The choice does no I/O and never awaits; a request that finds no free replica waits in a queue.
"""
