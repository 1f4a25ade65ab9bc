"""Load generation by native programs. One process sends the load; if one core is not enough, several jobs share it."""
