"""Computes what a deployment would run, and finds its faults, before anything starts."""
