"""Load generation and measurement: sweeps over topologies, the cost of relaying a request, soak tests."""
