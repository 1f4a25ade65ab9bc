"""Scripts that the engine's interpreter runs by their path. They import nothing of hpc_router, which is not installed
there.

The scripts are in a separate folder, because Python puts a script's folder first on its search path. In the folder
above, our `vllm.py` would hide the real vllm.
"""
