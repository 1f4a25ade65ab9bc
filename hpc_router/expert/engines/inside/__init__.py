"""Scripts that the engine's interpreter runs by path. It does not have hpc_router, so they import nothing of this
package.

They are in a separate folder, because Python puts a script's folder first on its search path, where our `vllm.py` would
hide the real vllm.
"""
