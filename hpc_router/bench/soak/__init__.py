"""`hpc-router bench soak`: load on a deployment whose processes are killed on a schedule.

The benchmark starts a deployment on this machine, loads it with short requests and streams, and kills processes. A kill
explains only two kinds of failure: an error event in a stream that was in flight on a killed replica, and a broken
connection to a killed worker. Any other failed request fails the soak.
"""
