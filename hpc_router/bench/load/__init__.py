"""Load generation by native programs: one process each, and several jobs if one core is not enough."""
