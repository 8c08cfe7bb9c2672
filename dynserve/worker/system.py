"""The worker's system server: `/health`, `/live`, `/metrics`, and the model files that frontends fetch.

With mutual TLS the files have a server of their own: Kubernetes' probes and Prometheus have no certificate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse

from dynserve.worker.metrics import WorkerMetrics
from dynserve.worker.worker import Worker


def system_app(get_workers: Callable[[], Sequence[Worker]], *, files: bool = True) -> FastAPI:
    """Makes the system server's app. It answers before the executor is open, while `get_workers` still returns an empty
    list. The list has several workers when one engine has several KV caches. `files`: serve the model files, too."""
    app = FastAPI(title="dynserve worker", docs_url=None, redoc_url=None)
    metrics = WorkerMetrics(get_workers)

    @app.get("/live")
    async def live() -> dict[str, str]:
        return {"status": "live"}

    @app.get("/health")
    async def health() -> JSONResponse:
        reports = [_health_of(worker) for worker in get_workers()]
        if not reports:
            return JSONResponse({"status": "starting"}, 503)
        worst = next((one["status"] for one in reports if one["status"] != "ready"), "ready")
        body = reports[0] if len(reports) == 1 else {"status": worst, "ranks": reports}
        return JSONResponse(body, 200 if worst == "ready" else 503)

    @app.get("/metrics")
    async def metrics_page() -> Response:
        return Response(metrics.render(), media_type=metrics.content_type)

    if files:
        _add_files(app, get_workers)
    return app


def files_app(get_workers: Callable[[], Sequence[Worker]]) -> FastAPI:
    """Makes an app that serves the model files and nothing else."""
    app = FastAPI(title="dynserve model files", docs_url=None, redoc_url=None, openapi_url=None)
    _add_files(app, get_workers)
    return app


def _add_files(app: FastAPI, get_workers: Callable[[], Sequence[Worker]]) -> None:
    @app.get("/files/{digest}")
    async def file(digest: str) -> Response:
        content = next((worker.files[digest] for worker in get_workers() if digest in worker.files), None)
        if content is None:
            return JSONResponse({"error": f"no model file {digest}"}, 404)
        return Response(content, media_type="application/octet-stream")


def _health_of(worker: Worker) -> dict[str, Any]:
    load = worker.executor.load()
    return {
        "status": "draining" if worker.draining else "ready" if worker.ready else "starting",
        "id": worker.id,
        "role": worker.config.disaggregation_mode,
        "model": worker.config.model_name,
        "frontends": list(worker.links),
        "load": {name: getattr(load, name) for name in load.__struct_fields__},
        "requests": dict(worker.counts),
        **({"executor": state} if (state := dict(worker.executor.describe())) else {}),
    }
