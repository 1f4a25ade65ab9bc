"""The replicas of each expert as one process sees them: states, load, queues, and the choice of one.

Decisions here do no I/O and never await.
"""
