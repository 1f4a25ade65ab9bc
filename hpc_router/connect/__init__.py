"""`hpc-router connect`: one fixed address for plain clients, which forwards requests to the router that leads."""
