"""In-cluster clients of a run: the official openai client, and the router's address for any other library.

Importing this package loads neither openai nor an HTTP library.
"""

from hpc_router.client.leader import NoRouterError
from hpc_router.client.openai_clients import Endpoint, async_openai_client, endpoint, openai_client

__all__ = ["Endpoint", "NoRouterError", "async_openai_client", "endpoint", "openai_client"]
