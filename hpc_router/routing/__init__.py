"""From a prompt to an expert: the policies, and the classifier with its artefact.

A decision does no I/O and knows nothing of replicas.
"""
