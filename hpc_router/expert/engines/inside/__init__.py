"""Scripts that the engine's interpreter runs by their path. They import nothing of hpc_router, which is not installed
there.

The scripts are in a separate folder, because Python puts a script's folder first on its search path: beside our
`vllm.py` they would import that module instead of the real vllm.
"""
