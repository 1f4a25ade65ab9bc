"""What runs on a login node and in the control loop: planning, launching, and the commands."""
