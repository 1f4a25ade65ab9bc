"""Load generation and measurement: sweeps over topologies, what relaying costs, soaks."""
