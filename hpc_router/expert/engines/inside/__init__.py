"""Scripts that an *engine's* interpreter runs by path. It has no hpc_router, so they import nothing of ours.

They have a folder of their own because Python puts a script's folder first on its search path, where `vllm.py` beside
them would hide the real vllm.
"""
