"""Desired state against observed state: which jobs to submit, drain or cancel."""
