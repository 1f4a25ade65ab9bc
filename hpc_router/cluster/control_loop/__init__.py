"""The control loop: compares the desired with the observed state, and submits, drains and cancels jobs."""
