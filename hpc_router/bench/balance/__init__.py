"""`hpc-router bench balance`: policies that choose a replica, side by side over the same simulated engines and load.

The load mixes Mooncake's conversation trace, requests that share long system prompts, and conversations of several
turns. Each policy gets fresh engines and the same requests at the same times.
"""
