"""The engine's process (or thread) as its owner sees it: requests go in, a thread of its own brings what comes out."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import sys
import threading
from collections import deque
from typing import Any

from . import _messages as m
from ._contract import OLD
from .executor.result import RequestOutput

log = logging.getLogger("TRT-LLM")


class Proxy:
    """`_fatal_error` is what killed the engine. On 1.2 nobody notices that it is dead."""

    def __init__(self, setup: m.Setup, event_buffer: int, stats_len: int) -> None:
        if not OLD:
            self._fatal_error: BaseException | None = None
        self._results: dict[int, RequestOutput] = {}
        self._loops: dict[int, asyncio.AbstractEventLoop] = {}
        self.events: deque[bytes] = deque()
        self._most_events, self._told = event_buffer, False
        self.stats: deque[bytes] = deque(maxlen=stats_len)
        self._process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None
        self._closing = False
        ours, theirs = socket.socketpair()
        self._sock = ours
        if os.environ.get("TLLM_WORKER_USE_SINGLE_PROCESS") == "1":
            from ._engine import main

            self._thread = threading.Thread(target=main, args=(theirs,), kwargs={"thread": True}, daemon=True)
            self._thread.start()
        else:
            command = [sys.executable, "-m", "tensorrt_llm._engine", str(theirs.fileno())]
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
            theirs.close()
        self._send(setup)
        rest: list[Any] = []
        while not (found := [message for message in rest if isinstance(message, m.Ready)]):
            frame = m.read_frame(ours)
            if frame is None:
                raise RuntimeError("Executor worker died during initialization")
            rest += m.decode_from_engine(frame)
        self.ready = found[0]
        if self.ready.error:
            raise RuntimeError(f"Executor worker returned error: {self.ready.error}")
        self._take([message for message in rest if not isinstance(message, m.Ready)])
        threading.Thread(target=self._read, daemon=True, name="proxy_dispatch_result").start()

    def submit(self, result: RequestOutput, message: m.Submit) -> None:
        self._results[message.id] = result
        self._loops[message.id] = asyncio.get_running_loop()
        self._send(message)

    def abort(self, request_id: int, early: bool) -> None:
        self._send(m.Abort(request_id, early))

    def crash_loop(self, text: str) -> None:
        """Ends the engine's event loop; nothing here notices it."""
        self._send(m.Crash(text))

    def shutdown(self) -> None:
        """Waits for the engine without a bound, as the real one does."""
        if self._closing:
            return
        self._closing = True
        self._send(m.Shutdown())
        if self._process is not None:
            self._process.wait()
        self.join()

    def join(self) -> None:
        """Ends the engine's thread, whatever state it is in: tests that broke it leave nothing behind."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        if self._thread is not None:
            self._thread.join(10)
        if self._process is not None:
            if self._process.poll() is None:
                self._process.kill()
            self._process.wait()
        self._sock.close()

    @property
    def closed(self) -> bool:
        return self._closing

    @property
    def dead(self) -> bool:
        return getattr(self, "_fatal_error", None) is not None

    def _send(self, message: Any) -> None:
        try:
            self._sock.sendall(m.framed([message]))
        except OSError:
            if OLD and not self._closing and self._process is not None:
                threading.Event().wait()  # the real one's queue to a process that is gone blocks for ever

    def _read(self) -> None:
        while (frame := m.read_frame(self._sock)) is not None:
            self._take(m.decode_from_engine(frame))
        if not self._closing:
            self._died(RuntimeError("MPI worker rank 0 exited unexpectedly"))

    def _take(self, messages: list[Any]) -> None:
        woken: dict[asyncio.AbstractEventLoop, list[Any]] = {}
        for message in messages:
            match message:
                case m.Response(id=number):
                    result = self._results.get(number)
                    if result is None:
                        continue
                    loop = self._loops[number]
                    if message.finish_reason or message.error:
                        del self._results[number], self._loops[number]
                    result._responses.append(message)
                    woken.setdefault(loop, []).append(result)
                case m.Rows(events=events, stats=stats):
                    self.stats.extend(stats)
                    self.events.extend(events if self._most_events else [])
                    self._drop()
                case m.Fatal(text=text):
                    self._died(RuntimeError(text))
        for loop, results in woken.items():
            _tell(loop, _wake, results)

    def _drop(self) -> None:
        while len(self.events) > self._most_events:
            self.events.popleft()
            if not self._told:
                self._told = True
                log.warning("The event queue has reached the max size of %d, dropping oldest", self._most_events)

    def _died(self, cause: BaseException) -> None:
        if OLD:
            return
        from .executor.utils import EngineDeadError

        self._fatal_error = cause
        for number, result in list(self._results.items()):
            result._responses.append(EngineDeadError(cause))
            _tell(self._loops[number], _wake, [result])
        self._results.clear()


def _wake(results: list[Any]) -> None:
    for result in results:
        result._event.set()


def _tell(loop: asyncio.AbstractEventLoop, call: Any, *args: Any) -> None:
    try:
        loop.call_soon_threadsafe(call, *args)
    except RuntimeError:
        pass  # the loop is closed: nobody waits any more
