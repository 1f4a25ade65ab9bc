"""The replicas of each expert, as one process of the router knows them: their states, load and queues, and the choice
of one of them for a request.

The choice does no I/O and never awaits; a request that finds no free replica waits in a queue.
"""
