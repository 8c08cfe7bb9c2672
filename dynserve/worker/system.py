"""The worker's system server: `/health`, `/live`, `/metrics`, and the model files that frontends fetch."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse

from dynserve.metrics import WorkerMetrics
from dynserve.worker.worker import Worker


def system_app(get_worker: Callable[[], Worker | None]) -> FastAPI:
    """`get_worker` gives None until the executor is open: the server answers from the first second on."""
    app = FastAPI(title="dynserve worker", docs_url=None, redoc_url=None)
    metrics = WorkerMetrics(get_worker)

    @app.get("/live")
    async def live() -> dict[str, str]:
        return {"status": "live"}

    @app.get("/health")
    async def health() -> JSONResponse:
        worker = get_worker()
        if worker is None:
            return JSONResponse({"status": "starting"}, 503)
        status = "draining" if worker.draining else "ready" if worker.ready else "starting"
        load = worker.executor.load()
        body = {
            "status": status,
            "id": worker.id,
            "role": worker.config.disaggregation_mode,
            "model": worker.config.model_name,
            "frontends": list(worker.links),
            "load": {name: getattr(load, name) for name in load.__struct_fields__},
            "requests": dict(worker.counts),
        }
        return JSONResponse(body, 200 if status == "ready" else 503)

    @app.get("/metrics")
    async def metrics_page() -> Response:
        return Response(metrics.render(), media_type=metrics.content_type)

    @app.get("/files/{digest}")
    async def file(digest: str) -> Response:
        worker = get_worker()
        content = worker.files.get(digest) if worker is not None else None
        if content is None:
            return JSONResponse({"error": f"no model file {digest}"}, 404)
        return Response(content, media_type="application/octet-stream")

    return app
