"""Trimtab: serve a language model with tiny learned corrections that act only where the model is unsure.

`import trimtab` needs httpx and pydantic only. The server, kernels and trainer live in the sub-packages and are
imported where they are used.
"""

from trimtab.clients import AsyncClient, Client
from trimtab.errors import TrimtabError

__version__ = "0.1.0"
__all__ = ["AsyncClient", "Client", "TrimtabError", "__version__"]
