"""What a deployment would run and whether it can, before anything starts."""
