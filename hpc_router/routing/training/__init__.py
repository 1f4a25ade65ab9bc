"""How artefacts are made. Nothing the router loads: these modules may use scipy, scikit-learn, torch, transformers."""
