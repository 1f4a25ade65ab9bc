"""Trains classifier artefacts from files of prompts. Needs the `train` extra; the router must not import it."""
