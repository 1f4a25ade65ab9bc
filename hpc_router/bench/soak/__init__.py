"""`hpc-router bench soak`: traffic over a deployment of its own that is struck again and again, and what that cost.

A deployment on this machine is brought up, loaded with short requests and streams, and its processes are killed on a
schedule. Every request that failed is held against the strikes: a stream in flight on a killed replica may end in an
error event, a connection of a killed worker may break; nothing else may fail.
"""
