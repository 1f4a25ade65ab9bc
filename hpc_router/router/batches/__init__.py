"""Files and batches: stores what users upload, and runs their batches of requests through the router."""
