"""Logging, signals and exit codes of the command-line processes."""

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
from dynserve.open_files import raise_file_limit

log = logging.getLogger(__name__)


class StopSignal:
    """Handles SIGTERM and SIGINT: the first cancels the start, or drains a serving process; the second exits at once."""

    def __init__(self) -> None:
        self._requested = asyncio.Event()
        self._task = asyncio.current_task()
        self._serving = False

    @property
    def requested(self) -> bool:
        return self._requested.is_set()

    def on_hangup(self, callback: Callable[[], None]) -> None:
        """Calls back for each SIGHUP, which otherwise ends the process."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, callback)

    async def wait(self, *also: asyncio.Future[None]) -> None:
        """Marks the process as serving. Returns at the first signal, or raises the error of one of `also`."""
        self._serving = True
        waiting = asyncio.ensure_future(self._requested.wait())
        watched: list[asyncio.Future[Any]] = [waiting, *also]
        try:
            done, _ = await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
            for future in done:
                future.result()
        finally:
            waiting.cancel()

    def signalled(self) -> None:
        if self._requested.is_set():
            os._exit(130)
        self._requested.set()
        if not self._serving and self._task is not None:
            self._task.cancel()


def settle_memory() -> None:
    """Tunes the garbage collector of a process that has started. Today's objects live on, so they are never scanned again;
    new ones are scanned more rarely, since tokens leave no reference cycles."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 100)


def run_role(
    config: type[Config],
    prog: str,
    run: Callable[[Config, StopSignal], Coroutine[Any, Any, None]],
    argv: Sequence[str] | None,
) -> NoReturn:
    """Runs a role: loads the configuration from flags, runs the process, and exits with its exit code."""
    try:
        made = load(config, prog, sys.argv[1:] if argv is None else argv)
        run_process(partial(run, made), made.log_level)
    except ConfigError as error:
        exit_with(error)


def run_process(main: Callable[[StopSignal], Coroutine[Any, Any, None]], log_level: str) -> NoReturn:
    """Runs `main` and exits the process with 0, 1 after an error, or 3 after the death of a worker's engine. Threads of
    foreign code that still run are not waited for.

    Raises:
        ConfigError: `main` raised it; the caller exits with 2.
    """
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
            if not stop.requested:
                raise

    raise_file_limit()
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
        log.exception("the process ends with an unexpected error")
        code = 1
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)
