"""Chooses an expert for a prompt: policies, the classifier and its artefact.

A decision does no I/O and knows experts but not their replicas.
"""
