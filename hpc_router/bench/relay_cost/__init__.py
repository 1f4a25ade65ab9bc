"""`hpc-router bench router`: CPU cost of a relayed request and of a streamed event, for this router and other relays.

Everything runs on this machine, in one call, over loopback: the load generator and a mock engine share one or two
cores, and the relay under test has another core. `rounds` holds the order of the measurements, `measurements` what is
measured of each relay, `targets` the limits that this router must keep.
"""
