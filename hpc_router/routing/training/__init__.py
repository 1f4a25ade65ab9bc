"""Training of classifier artefacts. Needs the `train` extra; the router never imports it."""
