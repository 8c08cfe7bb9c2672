"""errors, tasks, streams."""

from __future__ import annotations

import ast
import asyncio
from pathlib import Path

import pytest

from dynserve import errors
from dynserve.errors import ClusterError, DynserveError, InternalError, TimedOut, Unavailable, from_wire, translate
from dynserve.streams import Channel
from dynserve.tasks import persist, running, task_group, within


def every_error(root: type[DynserveError] = DynserveError) -> list[type[DynserveError]]:
    return [
        root,
        *(e for child in root.__subclasses__() if child.__module__ == errors.__name__ for e in every_error(child)),
    ]


def test_every_error_survives_the_wire_under_its_own_code() -> None:
    for cls in every_error():
        assert from_wire(cls.code, "why").code == cls.code
        assert str(from_wire(cls.code, "why")) == "why"


def test_an_unknown_code_becomes_an_internal_error_that_names_it() -> None:
    error = from_wire("from_the_future", "why")
    assert isinstance(error, InternalError)
    assert "from_the_future" in str(error)


def test_translate_takes_the_first_class_that_matches_and_chains_the_cause() -> None:
    with (
        pytest.raises(TimedOut, match="asking: late") as caught,
        translate({TimeoutError: TimedOut, OSError: Unavailable}, "asking"),
    ):
        raise TimeoutError("late")
    assert isinstance(caught.value.__cause__, TimeoutError)


def test_translate_lets_other_errors_through() -> None:
    with pytest.raises(KeyError), translate({OSError: Unavailable}, "asking"):
        raise KeyError("x")


async def test_leaving_a_task_group_ends_its_loops() -> None:
    ended = asyncio.Event()

    async def loop() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with task_group() as group:
        group.create_task(loop())
        await asyncio.sleep(0)
    assert ended.is_set()


async def test_a_loop_that_fails_ends_its_owner_with_its_own_error() -> None:
    async def fail() -> None:
        raise Unavailable("gone")

    with pytest.raises(Unavailable, match="gone"):
        async with running(fail()):
            await asyncio.Event().wait()


async def test_persist_tries_until_it_works() -> None:
    tries = []

    async def attempt() -> str:
        tries.append(1)
        if len(tries) < 3:
            raise Unavailable("not yet")
        return "there"

    assert await persist(attempt, retry_on=ClusterError, waiting_for="it") == "there"


async def test_clean_up_that_hangs_is_given_up_and_clean_up_that_fails_is_swallowed() -> None:
    async def fail() -> None:
        raise OSError("no")

    assert await within(0.01, asyncio.Event().wait(), "hanging") is None
    assert await within(1.0, fail(), "failing") is None


async def test_a_channel_gives_a_burst_in_one_take() -> None:
    channel: Channel[int] = Channel(10)
    for i in range(3):
        assert channel.put(i)
    assert await channel.take() == [0, 1, 2]


async def test_a_full_channel_refuses_and_keeps_what_it_has() -> None:
    channel: Channel[str] = Channel(10)
    assert channel.put("a", 8)
    assert not channel.put("b", 3)
    assert channel.statistics() == (1, 8, 10)
    assert await channel.take() == ["a"]
    assert channel.put("b", 3)


async def test_a_closed_channel_gives_what_waits_and_then_its_error() -> None:
    channel: Channel[int] = Channel(10)
    channel.put(1)
    channel.close(Unavailable("cut"))
    channel.close()
    assert not channel.put(2)
    assert await channel.take() == [1]
    with pytest.raises(Unavailable):
        await channel.take()


async def test_a_waiting_consumer_wakes_when_the_channel_ends() -> None:
    channel: Channel[int] = Channel(10)
    waiting = asyncio.ensure_future(channel.take())
    await asyncio.sleep(0)
    channel.close()
    assert await waiting == []


def test_every_error_of_the_package_is_in_the_module_of_errors() -> None:
    """One that is defined elsewhere may come too late for the table of codes."""
    names = {cls.__name__ for cls in every_error()}
    for path in Path(errors.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and path.name != "errors.py":
                bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
                assert not bases & names, f"{node.name} in {path}"
