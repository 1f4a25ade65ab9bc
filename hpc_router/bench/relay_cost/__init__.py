"""`hpc-router bench router`: CPU cost of a relayed request and of a streamed event, for this router and other relays.

All processes run on this machine, in one call, over loopback. The load generator and a mock engine run on one or two
cores, and the relay under test on another. `rounds` defines the order of the measurements, `measurements` the figures
of each relay, and `targets` the limits that this router must keep.
"""
