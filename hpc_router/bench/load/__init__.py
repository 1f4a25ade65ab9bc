"""Load generators: one process each, natively compiled, spread over jobs where one is not enough."""
