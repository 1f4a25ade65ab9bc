"""What the processes of a deployment tell each other through the run directory.

Every file has one writer, which replaces it atomically. A reader tolerates a file that is missing, stale or half
copied.
"""
