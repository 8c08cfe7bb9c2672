"""`python -m dynserve.worker`: one worker process."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from dynserve.config import WorkerConfig
from dynserve.executors.base import check_engine_options, open_executor, prepare_executor
from dynserve.hub import is_id, with_model_folder
from dynserve.model_files import check_model_folder
from dynserve.plane_tls import plane_tls
from dynserve.process import StopSignal, run_role, settle_memory
from dynserve.server.serving import Tls, bind, serving, url_of
from dynserve.tasks import detached, unless_failed
from dynserve.transport.planes import open_planes
from dynserve.worker.model_text import ModelText
from dynserve.worker.serving import new_instance_id, serving_targets
from dynserve.worker.system import files_app, system_app
from dynserve.worker.worker import Worker

log = logging.getLogger("dynserve.worker")


async def run(config: WorkerConfig, stop: StopSignal) -> None:
    if is_id(config.model_path):
        check_engine_options(config)  # before the model is downloaded
    else:
        check_model_folder(Path(config.model_path))
    instance_id = new_instance_id(config.role)
    workers: list[Worker] = []
    async with AsyncExitStack() as stack:
        sock = bind(config.system_host, config.system_port, "--system-port")
        system_url = url_of(sock, advertise_host=config.advertise_host)
        tls = plane_tls(config)
        await stack.enter_async_context(serving(system_app(lambda: workers, files=tls is None), sock))
        files_url = ""
        if tls is not None:
            files_sock = bind(config.link_host, 0, "--link-host")
            files_url = url_of(files_sock, "https", config.advertise_host)
            certificates = Tls(tls.certificate, tls.key, client_ca=tls.ca)
            await stack.enter_async_context(serving(files_app(lambda: workers), files_sock, tls=certificates))
        config = await with_model_folder(config)  # while /live answers already
        check_model_folder(Path(config.model_path))
        # a wrong option ends the wait for the planes; the import of torch, a second, overlaps with it
        checking = detached(_prepared, config)
        async with unless_failed(checking):
            planes = await stack.enter_async_context(open_planes(config, instance_id))
        text, prepared = await checking
        executor = await stack.enter_async_context(open_executor(config, instance_id, prepared=prepared))
        serving_all = serving_targets(config, executor, planes, instance_id, system_url, files_url, text)
        workers += await stack.enter_async_context(serving_all)
        settle_memory()
        log.info("%s serves %s; system server at %s", instance_id, config.model_name, system_url)
        await stop.wait(executor.failed)
        log.info("%s stops: it accepts no new requests and finishes the open ones", instance_id)


def _prepared(config: WorkerConfig) -> tuple[ModelText, Any]:
    """Checks the model's text files, the engine options and the executor. Raises ConfigError."""
    return ModelText.read(Path(config.model_path)), prepare_executor(config)


def main(argv: Sequence[str] | None = None) -> None:
    run_role(WorkerConfig, "python -m dynserve.worker", run, argv)


if __name__ == "__main__":
    main()
