"""Load generation: compiled load generators, one process each, in several jobs if one core is not enough."""
