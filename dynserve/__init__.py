"""dynserve: an asyncio serving runtime for large language models.

The public names below are imported on first use, so that `import dynserve` is fast: a frontend never imports torch, and a
script that only uses `dynserve.errors` never imports FastAPI.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dynserve import errors
from dynserve.errors import DynserveError
from dynserve.version import VERSION

if TYPE_CHECKING:
    from dynserve.cluster import Cluster
    from dynserve.config import FrontendConfig, UpConfig, WorkerConfig
    from dynserve.executors.base import Executor, open_executor
    from dynserve.frontend.frontend import Frontend
    from dynserve.routing.router import Router
    from dynserve.worker.worker import Worker

__version__ = VERSION

__all__ = [
    "Cluster",
    "DynserveError",
    "Executor",
    "Frontend",
    "FrontendConfig",
    "Router",
    "UpConfig",
    "Worker",
    "WorkerConfig",
    "__version__",
    "errors",
    "open_executor",
]

_HOMES = {
    "Cluster": "dynserve.cluster",
    "Executor": "dynserve.executors.base",
    "Frontend": "dynserve.frontend.frontend",
    "FrontendConfig": "dynserve.config",
    "Router": "dynserve.routing.router",
    "UpConfig": "dynserve.config",
    "Worker": "dynserve.worker.worker",
    "WorkerConfig": "dynserve.config",
    "open_executor": "dynserve.executors.base",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'dynserve' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
