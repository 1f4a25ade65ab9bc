"""The verbs of the command line that act on a deployment, one module each."""
