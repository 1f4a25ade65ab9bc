"""Predicts how a deployment would serve a given demand: latencies, throughput, waiting and GPU hours.

A simulation of discrete events, without processes and without real time: users, the router's queues and limits, the
engines' steps (`hpc_router.sim`), and the decisions on the number of replicas (`control_loop.elasticity`), which are
the same code that runs in a deployment. The result is a prediction and must never be reported as a measurement.
"""
