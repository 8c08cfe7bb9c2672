"""Supervised child processes: they are started, restarted with back-off and stopped; their log lines get a prefix."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import NamedTuple

from dynserve.errors import ConfigError, InternalError
from dynserve.tasks import Backoff, OwnedTasks

TERMINATE_TIMEOUT = 45.0  # seconds between SIGTERM and SIGKILL: more than the drain of a worker or a frontend
STEADY = 30.0  # seconds of running after which the back-off starts again
_PR_SET_PDEATHSIG = 1


class ChildSpec(NamedTuple):
    """The command of a child. `environment` is added to this process's own; secrets go there, since `ps` shows commands.

    `whole_group`: signals go to all processes of the child's process group, for a shell that does not pass them on.
    """

    name: str
    command: list[str]
    environment: Mapping[str, str] = {}
    folder: str | None = None  # to run in; None: this process's own
    grace_s: float = TERMINATE_TIMEOUT  # between SIGTERM and SIGKILL
    fds: tuple[int, ...] = ()  # descriptors that it inherits
    whole_group: bool = False


class Group(NamedTuple):
    """Children that are stopped together. With `restart`, a child that dies is started again."""

    specs: Sequence[ChildSpec]
    restart: bool = True


Renewed = Callable[[str], ChildSpec]
OnLine = Callable[[str, str], None]  # a child's name and a line of its output


class Child:
    """One child process. Calls `died(child, code)` for each exit that `stop` did not cause, before a restart. `renewed`
    returns the spec for a restart, by the child's name; None: the same one."""

    def __init__(
        self, spec: ChildSpec, *, restart: bool, died: Callable[[Child, int], None], width: int, tasks: OwnedTasks,
        on_line: OnLine | None = None, renewed: Renewed | None = None,
    ) -> None:  # fmt: skip
        self._renewed = renewed
        self.name, self.spec, self.restarts = spec.name, spec, restart
        self._died, self._width, self._tasks, self._on_line = died, width, tasks, on_line
        self._process: asyncio.subprocess.Process | None = None
        self.starts = 0
        self._stopping = False
        self._ending: asyncio.Future[None] | None = None
        self.replaced = False  # another child is taking its place: it is not started again
        self._watcher: asyncio.Task[None] | None = None

    def kill(self) -> None:
        """Ends the process at once, for an owner that cannot wait."""
        self._stopping = True
        if self._process is not None and self._process.returncode is None:
            self._signal(self._process, signal.SIGKILL)

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    async def start(self) -> None:
        await self._spawn()
        self._watcher = self._tasks.create_task(self._watch())

    async def stop(self) -> None:
        """Sends SIGTERM, and SIGKILL to a child that still runs after its `grace_s`. A second call waits for the first."""
        if self._ending is None:
            self._ending = asyncio.ensure_future(self._stop())
        await asyncio.shield(self._ending)

    async def _stop(self) -> None:
        self._stopping = True
        process = self._process
        if process is not None and process.returncode is None:
            self._signal(process, signal.SIGTERM)
            try:
                async with asyncio.timeout(self.spec.grace_s):
                    await process.wait()
            except TimeoutError:
                self._say(f"did not stop within {self.spec.grace_s:.0f} s; killed")
                self._signal(process, signal.SIGKILL)
                await process.wait()
        if self._watcher is not None:
            await asyncio.wait([self._watcher], timeout=1.0)

    def _signal(self, process: asyncio.subprocess.Process, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            if self.spec.whole_group:
                os.killpg(process.pid, number)  # it began a session, and with it a group of its number
            else:
                process.send_signal(number)

    async def _spawn(self) -> None:
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self.spec.command,
                cwd=self.spec.folder,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the parent, which stops its children in order
                preexec_fn=_die_with_parent,
                pass_fds=self.spec.fds,
                env=os.environ | {"PYTHONUNBUFFERED": "1"} | dict(self.spec.environment),
            )
        except OSError as error:
            raise ConfigError(f"cannot start {self.name}: {error}") from error
        self.starts += 1

    async def _watch(self) -> None:
        backoff = Backoff(0.5, 10.0)
        while True:
            began = time.monotonic()
            process = self._process
            assert process is not None and process.stdout is not None
            while line := await _line(process.stdout):
                self._say(line.decode("utf-8", "replace").rstrip())
            code = await process.wait()
            if self._stopping:
                return
            self._say(f"died with exit code {code}")
            self._died(self, code)
            if not self.restarts or self.replaced:
                return
            if time.monotonic() - began > STEADY:
                backoff.reset()
            wait = backoff.next()
            self._say(f"starting again in {wait:.1f} s")
            await asyncio.sleep(wait)
            if self._stopping:
                return
            if self._renewed is not None:
                self.spec = self._renewed(self.name)
            await self._spawn()
            if self._stopping and self._process is not None:  # `stop` was called during the start
                self._signal(self._process, signal.SIGTERM)

    def _say(self, line: str) -> None:
        if self._on_line is not None:
            self._on_line(self.name, line)
        with contextlib.suppress(OSError):
            print(f"{self.name:>{self._width}} | {line}", file=sys.stderr, flush=True)


class Supervisor:
    """Groups of children that run together. They are started in the order of the groups, and stopped in reverse.

    `broken` gets the error that ends all of them: a child reported a wrong configuration, or a child without restarts
    died. `on_line` gets each child's lines, with its name; `on_death` the name of a child of a group that has died.
    `renewed`: see `Child`.
    """

    def __init__(
        self, groups: Sequence[Group], tasks: OwnedTasks, on_line: OnLine | None = None, *,
        on_death: Callable[[str], None] | None = None, renewed: Renewed | None = None,
    ) -> None:  # fmt: skip
        self._on_death, self._renewed = on_death, renewed
        self._changing: set[Child] = set()  # children that are to join a group, or have left one and still run
        self._stopping = False
        self._width = max(len(spec.name) for group in groups for spec in group.specs)
        self._tasks, self._on_line = tasks, on_line
        self.groups = [[self._child(spec, group.restart) for spec in group.specs] for group in groups]
        self.broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def start(self) -> None:
        for group in self.groups:
            for child in group:
                await child.start()

    async def add(self, spec: ChildSpec, group: list[Child]) -> None:
        """Starts one more child of a group, with restarts."""
        child = self._child(spec, True)
        await child.start()
        group.append(child)

    async def replace(
        self, child: Child, group: list[Child], spec: ChildSpec, ready: Callable[[], Awaitable[bool]]
    ) -> None:
        """Starts another child in the place of one. If it gets `ready`, the old one is stopped, in the background;
        otherwise the new one.

        Raises:
            InternalError: the new child did not become ready.
        """
        new = self._child(spec, True)
        new.starts = 1  # this configuration has worked before
        self._changing.add(new)
        leaving, child.replaced = new, True
        try:
            await new.start()
            if not await ready() or self._stopping or child not in group:
                raise InternalError(f"the new {spec.name} did not become ready; the old one goes on")
            group[group.index(child)] = new
            self._changing.discard(new)
            leaving = child
        finally:
            self._tasks.create_task(self._retire(leaving))
            if leaving is new:
                child.replaced = False
                if child.pid is None and not self._stopping:  # it died meanwhile
                    child.spec = child.spec if self._renewed is None else self._renewed(child.name)
                    await child.start()

    async def _retire(self, child: Child) -> None:
        self._changing.add(child)
        await child.stop()
        self._changing.discard(child)

    async def remove(self, child: Child, group: list[Child]) -> None:
        """Stops one child of a group for good."""
        await child.stop()
        group.remove(child)

    def _child(self, spec: ChildSpec, restart: bool) -> Child:
        return Child(
            spec, restart=restart, died=self._died, width=self._width, tasks=self._tasks, on_line=self._on_line,
            renewed=self._renewed,
        )  # fmt: skip

    async def stop(self) -> None:
        self._stopping = True
        try:
            for group in reversed(self.groups):
                await asyncio.gather(*(child.stop() for child in group))
            await asyncio.gather(*(child.stop() for child in self._changing))
        except asyncio.CancelledError:
            for child in (*self._changing, *(child for group in self.groups for child in group)):
                child.kill()
            raise

    def _died(self, child: Child, code: int) -> None:
        if child in self._changing:
            return
        if self._on_death is not None:
            self._on_death(child.name)
        if self.broken.done():
            return
        # a child that has run before has a valid configuration: this error is temporary (its port is not free yet, say)
        if code == ConfigError.exit_code and child.starts == 1:
            self.broken.set_exception(ConfigError(f"{child.name} could not start; see its last log lines above"))
        elif not child.restarts and not child.replaced:
            self.broken.set_exception(InternalError(f"{child.name} died with exit code {code}"))
        if self.broken.done():
            self.broken.exception()  # marks it as retrieved: it is not always awaited


async def _line(stream: asyncio.StreamReader) -> bytes:
    """Reads the next line. A line longer than the reader's buffer is returned in pieces."""
    try:
        return await stream.readuntil(b"\n")
    except asyncio.IncompleteReadError as error:
        return error.partial
    except asyncio.LimitOverrunError as error:
        return await stream.readexactly(error.consumed)


def _die_with_parent() -> None:
    """Runs in the child before exec. The child gets SIGTERM even if the parent was killed with SIGKILL (Linux only)."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
