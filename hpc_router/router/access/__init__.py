"""Users' access to the router: their tokens, the experts they may use, and the limits of their requests."""
