"""What the command-line processes share: logging, signals, the exit code."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any, NoReturn

import uvloop

from dynserve.config import Config, exit_with, load
from dynserve.errors import ConfigError, DynserveError

log = logging.getLogger(__name__)


class StopSignal:
    """SIGTERM and SIGINT: the first ends the start-up at once or asks a serving process to finish; the second kills."""

    def __init__(self) -> None:
        self._asked = asyncio.Event()
        self._task = asyncio.current_task()
        self._serving = False

    @property
    def asked(self) -> bool:
        return self._asked.is_set()

    async def wait(self, *also: asyncio.Future[None]) -> None:
        """From here on the process serves: returns when it is asked to stop, or raises what one of `also` raises."""
        self._serving = True
        waiting = asyncio.ensure_future(self._asked.wait())
        watched: list[asyncio.Future[Any]] = [waiting, *also]
        try:
            done, _ = await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
            for future in done:
                future.result()
        finally:
            waiting.cancel()

    def signalled(self) -> None:
        if self._asked.is_set():
            os._exit(130)
        self._asked.set()
        if not self._serving and self._task is not None:
            self._task.cancel()


def settle_memory() -> None:
    """For a process that has started: what is there now stays, and is not looked through again and again; and what comes is
    looked through more rarely, since tokens come and go without rings."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 100)


def run_role(
    config: type[Config],
    prog: str,
    run: Callable[[Config, StopSignal], Coroutine[Any, Any, None]],
    argv: Sequence[str] | None,
) -> NoReturn:
    """A role's whole `main`: flags to configuration, configuration to a running process, its end to an exit code."""
    try:
        made = load(config, prog, sys.argv[1:] if argv is None else argv)
        run_process(partial(run, made), made.log_level)
    except ConfigError as error:
        exit_with(error)


def run_process(main: Callable[[StopSignal], Coroutine[Any, Any, None]], log_level: str) -> NoReturn:
    """Runs `main` to its end and leaves the process: 0, 1 after an error, 2 after a wrong configuration, 3 after the
    death of a worker's engine. What is left then are threads of others' code, which nothing waits for."""
    logging.basicConfig(
        level=log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    for noisy in ("httpx", "httpcore", "uvicorn", "grpc", "nats", "asyncio"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, logging.getLogger().level))

    async def with_signals() -> None:
        stop = StopSignal()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.signalled)
        try:
            await main(stop)
        except asyncio.CancelledError:
            if not stop.asked:
                raise

    code = 0
    try:
        uvloop.run(with_signals())
    except ConfigError:
        raise
    except DynserveError as error:
        log.error("%s", error)
        code = error.exit_code
    except SystemExit:
        raise
    except BaseException:
        log.exception("the process ends with an error that nobody expected")
        code = 1
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)
