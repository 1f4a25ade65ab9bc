"""A data-plane process: it accepts connections, routes each request and relays the response."""
