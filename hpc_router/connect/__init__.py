"""`hpc-router connect`: one address for plain clients, from which requests go to the router that leads."""
