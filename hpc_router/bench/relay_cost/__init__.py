"""`hpc-router bench router`: what a relayed request and a streamed event cost this router, beside other ways to relay.

Everything runs on this machine, in one run, over loopback: the load generator and a mock engine on one core, the relay
under test alone on another. `rounds` says in which order, `measure` what is measured, `checks` what is to be reached.
"""
