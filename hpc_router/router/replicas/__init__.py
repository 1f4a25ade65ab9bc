"""The replicas of each expert, as one process of the router knows them: states, load, queues, and the choice of a
replica.

The choice does no I/O and never awaits; a request that finds no free replica waits in a queue.
"""
