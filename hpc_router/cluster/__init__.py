"""Plans, starts, observes and ends the jobs of a deployment, on a login node and in the control loop."""
