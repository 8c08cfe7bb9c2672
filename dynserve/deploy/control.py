"""The control socket of a deployment on this machine: `dynserve deploy status`, `scale` and `logs` find it by name.

A Unix socket in a folder that only this user can open. A request is one line of JSON, the answer is one line, or for `logs`
the lines themselves until the client leaves.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import stat
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

from dynserve.errors import ConfigError, DynserveError, translate

MAX_REQUEST = 1 << 16  # bytes
MAX_WAITING = 1000  # lines that wait for a client of `logs`; older ones are dropped
REQUEST_TIMEOUT = 5.0  # seconds until a client has sent its request


class Controlled(Protocol):
    """What a socket controls."""

    lines: deque[str]
    listeners: list[Callable[[str], None]]

    @property
    def url(self) -> str: ...

    def processes(self) -> list[dict[str, Any]]: ...

    async def scale(self, name: str, count: int) -> None: ...


def control_folder() -> Path:
    """Returns the folder of the sockets, which is made. Raises ConfigError if another user owns it."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    folder = Path(runtime) / "dynserve" if runtime else Path("/tmp") / f"dynserve-{os.getuid()}"
    with translate({OSError: ConfigError}, f"the folder for control sockets {folder}"):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ConfigError(f"{folder} must be a folder that only you can open; remove it")
    return folder


def check_name(name: str) -> None:
    """Raises ConfigError for a name that cannot be that of a socket, or if the sockets' folder cannot be used."""
    if not re.fullmatch(r"[\w.-]{1,63}", name):
        raise ConfigError(f"{name!r} is not possible as a name: up to 63 letters, digits, dots and dashes")
    control_folder()


def running() -> list[str]:
    """Returns the names of the deployments that have a socket; that of a killed one may be left."""
    return sorted(path.stem for path in control_folder().glob("*.sock"))


@asynccontextmanager
async def controlled(name: str, deployment: Controlled) -> AsyncIterator[None]:
    """Answers on the deployment's socket for as long as the block. A second deployment of the same name replaces the first
    one's socket."""
    path = control_folder() / f"{name}.sock"
    path.unlink(missing_ok=True)
    server = await asyncio.start_unix_server(lambda r, w: _answer(deployment, r, w), path, limit=MAX_REQUEST)
    mine = path.stat().st_ino
    try:
        yield
    finally:
        server.close()
        with contextlib.suppress(OSError):
            if path.stat().st_ino == mine:
                path.unlink()


async def _answer(deployment: Controlled, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        async with asyncio.timeout(REQUEST_TIMEOUT):
            request = json.loads(await reader.readline())
        if request["what"] == "logs":
            await _logs(deployment, request, reader, writer)
            return
        try:
            answer = await _done(deployment, request)
        except DynserveError as error:
            answer = {"error": str(error)}
        writer.write(json.dumps(answer).encode() + b"\n")
        await writer.drain()
    except (OSError, ValueError, KeyError, TypeError, TimeoutError):
        pass  # a client that is none of ours, or has left
    finally:
        writer.close()


async def _done(deployment: Controlled, request: dict[str, Any]) -> dict[str, Any]:
    if request["what"] == "scale":
        for name, count in request["scale"].items():
            await deployment.scale(str(name), int(count))
    return {"url": deployment.url, "processes": deployment.processes()}


async def _logs(
    deployment: Controlled, request: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    component, tail = str(request.get("component") or "").lower(), int(request.get("tail", 0))
    waiting: deque[str] = deque(maxlen=MAX_WAITING)
    arrived = asyncio.Event()

    def heard(line: str) -> None:
        if _is_of(line, component):
            waiting.append(line)
            arrived.set()

    old = [line for line in deployment.lines if _is_of(line, component)]
    if request.get("follow"):
        deployment.listeners.append(heard)  # at once, so that no line is missed or sent twice
    left = asyncio.ensure_future(reader.read())  # ends when the client leaves
    try:
        writer.writelines(f"{line}\n".encode() for line in (old[-tail:] if tail else []))
        await writer.drain()
        while request.get("follow") and not left.done():
            woken = asyncio.ensure_future(arrived.wait())
            await asyncio.wait([left, woken], return_when=asyncio.FIRST_COMPLETED)
            woken.cancel()
            arrived.clear()
            while waiting:
                writer.write(f"{waiting.popleft()}\n".encode())
                await writer.drain()
    finally:
        if heard in deployment.listeners:
            deployment.listeners.remove(heard)
        left.cancel()


def _is_of(line: str, component: str) -> bool:
    """Whether a line comes from a process of this component; every line does if it is empty."""
    name = line.partition(" | ")[0]
    return component in ("", name) or name.rpartition("-")[0] == component


async def ask(name: str, request: dict[str, Any], timeout: float) -> dict[str, Any]:
    """Sends a request to a deployment on this machine, and returns its answer.

    Raises:
        ConfigError: it does not run, or refuses.
    """
    async with _connected(name, request) as reader:
        try:
            async with asyncio.timeout(timeout):
                answer: dict[str, Any] = json.loads(await reader.readline())
        except TimeoutError:
            raise ConfigError(f"{name} has not answered within {timeout:.0f} s") from None
        except (OSError, ValueError):
            raise ConfigError(f"{name} has ended meanwhile") from None
    if "error" in answer:
        raise ConfigError(str(answer["error"]))
    return answer


async def follow(name: str, request: dict[str, Any]) -> AsyncIterator[str]:
    """Yields lines of a deployment's output. Raises ConfigError if it does not run."""
    async with _connected(name, request) as reader:
        while line := await reader.readline():
            yield line.decode("utf-8", "replace").rstrip("\n")


@asynccontextmanager
async def _connected(name: str, request: dict[str, Any]) -> AsyncIterator[asyncio.StreamReader]:
    path = control_folder() / f"{name}.sock"
    try:
        reader, writer = await asyncio.open_unix_connection(path, limit=1 << 20)
    except OSError as error:
        if isinstance(error, ConnectionRefusedError):
            path.unlink(missing_ok=True)  # of a process that was killed
        raise ConfigError(f"{name} does not run on this machine{_others(name)}") from None
    try:
        writer.write(json.dumps(request).encode() + b"\n")
        yield reader
    finally:
        writer.close()


def _others(name: str) -> str:
    others: Sequence[str] = [one for one in running() if one != name]
    return f"; {', '.join(others)} does" if others else ""
