"""Benchmarks: sweeps over deployments, the CPU cost of relaying a request, and soak tests."""
