"""Grammars that need much time or memory fail only their own request, and their resources are released."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

from dynserve.api.json_schema import rules_of
from dynserve.config import TINY_MODEL
from dynserve.errors import BadRequest, Overloaded
from dynserve.executors.torch import grammars as module
from dynserve.executors.torch.grammar_weight import HEAVY as HEAVIEST
from dynserve.executors.torch.grammar_weight import MAX_TEXT, weight
from dynserve.executors.torch.grammars import CompiledGrammars, _GrammarCache
from dynserve.wire.requests import Grammar
from tests.conftest import until

HEAVY = Grammar(kind="regex", text="[a-z]?[b-y]?" * 300)  # most of a minute


def grammars() -> CompiledGrammars:
    return CompiledGrammars(Path(TINY_MODEL), 2048, [2])


async def compiling() -> psutil.Process:
    """Returns the compiling process as soon as it runs."""
    found: list[psutil.Process] = []

    def there() -> bool:
        found[:] = []
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error):  # one that has just ended
                if "grammar_compiler" in " ".join(child.cmdline()):
                    found.append(child)
        return bool(found)

    await until(there, 30)
    return found[0]


async def test_light_grammars_do_not_wait_for_heavy_ones() -> None:
    ours = grammars()
    heavy = [asyncio.create_task(ours.matcher(Grammar(kind="regex", text=HEAVY.text + "z" * i))) for i in range(6)]
    await compiling()
    for number in range(5):
        await ours.matcher(Grammar(kind="json", text=json.dumps({"type": "object", "title": str(number)})))
    assert not any(task.done() for task in heavy)
    for task in heavy:
        task.cancel()
    await asyncio.gather(*heavy, return_exceptions=True)


async def test_the_compilation_of_a_grammar_stops_at_its_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_COMPILE_S", 0.5)
    ours = grammars()
    pending = asyncio.create_task(ours.matcher(HEAVY))
    process = await compiling()
    with pytest.raises(BadRequest, match="takes longer than"):
        await pending
    await until(lambda: not process.is_running())
    with pytest.raises(BadRequest, match="too long to compile"):  # and a second request for it is refused at once
        await ours.matcher(HEAVY)


async def test_a_cancelled_request_ends_the_process_that_compiles_its_grammar() -> None:
    ours = grammars()
    pending = asyncio.create_task(ours.matcher(HEAVY))
    process = await compiling()
    pending.cancel()
    await asyncio.gather(pending, return_exceptions=True)
    await until(lambda: not process.is_running())
    assert not ours._processes.locked()


async def test_a_request_cancelled_while_its_process_starts_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    started, spawn = threading.Event(), module._spawn
    processes = []

    def slowly(vocabulary: Any) -> Any:
        started.wait(10)
        processes.append(spawn(vocabulary))
        return processes[0]

    monkeypatch.setattr(module, "_spawn", slowly)
    ours = grammars()
    pending = asyncio.create_task(ours.matcher(HEAVY))
    await asyncio.sleep(0.05)
    pending.cancel()
    await asyncio.gather(pending, return_exceptions=True)
    started.set()
    await until(lambda: bool(processes) and processes[0].returncode is not None)
    assert not ours._processes.locked()


async def test_a_killed_compiler_process_fails_the_request_with_the_cause() -> None:
    ours = grammars()
    pending = asyncio.create_task(ours.matcher(HEAVY))
    process = await compiling()
    while process.memory_info().rss < 50 << 20:
        await asyncio.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(Exception, match="too much memory|did not start"):
        await pending


async def test_a_grammar_compiled_in_a_process_constrains_like_one_of_a_thread() -> None:
    schema: dict[str, Any] = {"type": "array", "items": {"type": "string", "maxLength": 60}, "maxItems": 30}
    grammar = Grammar(kind="json", text=json.dumps(schema))
    ours = grammars()
    assert weight(grammar.kind, grammar.text) > ours._max_light
    matcher = (await ours.matcher(grammar))._matcher
    assert matcher.accept_string('["') and not matcher.accept_string("x" * 61) and matcher.accept_string('x"]')
    with pytest.raises(BadRequest, match="^the grammar cannot be used: [^/]+$"):
        await ours.matcher(Grammar(kind="regex", text="((" + "[a-z]{0,900}b{0,900}"))


def test_the_cache_of_compiled_grammars_is_bounded_in_bytes() -> None:
    class Compiled:
        memory_size_bytes = 300

    kept = _GrammarCache(1000)
    keys = [("json", f"{n}", "") for n in range(5)]
    for key in keys[:3]:
        kept.add(key, Compiled())  # type: ignore[arg-type]
    assert kept.get(keys[0]) is not None  # so that the next oldest goes first
    kept.add(keys[3], Compiled())  # type: ignore[arg-type]
    assert [kept.get(key) is not None for key in keys] == [True, False, True, True, False] and kept.size <= 1000


SCHEMA = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(50)}}


@pytest.mark.parametrize(
    ("kind", "grammar", "least", "most"),
    [
        ("json", SCHEMA, 0, 10),
        ("json", {"enum": [f"a{i}" for i in range(1000)]}, 0, 20),
        ("regex", "[0-9]{3}-[0-9]{4}", 5, 10),
        ("regex", "[a-z]+@[a-z]+", 1, 5),
        ("grammar", "root ::= " + " | ".join(f'"word{i}"' for i in range(100)), 0, 200),
        ("json", {"type": "string", "maxLength": 400}, 400, 500),
        ("json", {"properties": {f"p{i}": {"type": "string", "maxLength": 64} for i in range(10)}}, 640, 1000),
        ("json", {"type": "array", "maxItems": 50, "items": {"type": "array", "maxItems": 50, "items": {}}}, 2500, 1e5),
        ("json", {"properties": {"a": {"pattern": "([a-z]{0,60}){0,60}"}}}, 3600, 1e5),
        ("json", {"properties": {"maxLength": {"type": "string", "maxLength": 800}}, "required": ["maxLength"]}, 800, 1e4),
        ("json", {"patternProperties": {"^[a-z]{1,20000}$": {}}}, 20000, 1e5),
        ("json", {"properties": {f"p{i}": {"format": "email"} for i in range(10)}}, 100, 1e4),
        ("json", {"$defs": {"a": {"maxItems": 50, "items": {}}}, "maxItems": 50, "items": {"$ref": "#/$defs/a"}}, 2500, 1e6),
        ("regex", "." * 500, 500, 600),
        ("regex", "[a-z]?[b-y]?" * 50, 2500, 3000),
        ("json", {"pattern": "[a-z]?" * 100}, 2500, 3000),
        ("regex", "(" + "." * 180 + "){40}", 7200, 1e4),
        ("regex", "([a-z]{0,60}){0,60}", 3600, 1e4),
        ("regex", "a{0,100000}", 12500, 1e6),
        ("regex", "[^]a]{2}\\w{3,}(((x", 5, 10),
        ("grammar", "root ::= [a-z]{ 200 }", 200, 1e4),
        ("grammar", "root ::= a{50}\na ::= b{50}\nb ::= [a-z]{50}", 125000, 1e12),
        ("structural_tag", {"format": {"type": "regex", "pattern": "([a-z]{0,60}){0,60}"}}, 3600, 1e5),
        ("json", {"enum": ["x" * MAX_TEXT]}, HEAVIEST, HEAVIEST),
    ],
)  # fmt: skip
def test_the_cost_of_compiling_a_grammar_is_estimated(kind: str, grammar: Any, least: float, most: float) -> None:
    text = grammar if isinstance(grammar, str) else json.dumps(grammar)
    assert least <= weight(kind, text) <= most


def test_rules_of_a_schema_cost_their_own_states_and_not_those_of_the_rules_that_they_use() -> None:
    schema: Any = {"properties": {f"p{i}": {"type": "array", "maxItems": 50, "items": {"type": "string", "maxLength": 60}}
                                  for i in range(10)}}  # fmt: skip
    made = rules_of(schema, "x").text
    assert 100 < weight("json", json.dumps(schema), made) < 1000 < weight("json", json.dumps(schema))
    own, foreign = {"type": "grammar", "grammar": made}, {"type": "grammar", "grammar": "root ::= a{50}\na ::= [b]{90}"}
    tag = {"format": [{"type": "json_schema", "json_schema": schema}, foreign]}
    together = weight("structural_tag", json.dumps(tag), json.dumps({"format": [own, foreign]}))
    # a client's own rules count as nested within each other
    assert weight("grammar", foreign["grammar"]) + 100 < together < 10_000


async def test_a_heavy_grammar_that_compiles_quickly_is_compiled_in_the_worker_too() -> None:
    """Its compiled form is not passed on by the process: its text can have a hundred times its size."""
    schema: Any = {"properties": {f"p{i}": {"type": "string", "maxLength": 500} for i in range(5)}}
    grammar = Grammar(kind="json", text=json.dumps(schema), rules=rules_of(schema, "x").text)
    ours = grammars()
    assert weight(grammar.kind, grammar.text, grammar.rules) > ours._max_light
    matcher = (await ours.matcher(grammar))._matcher
    assert matcher.accept_string('{"p0": "' + "x" * 500) and not matcher.accept_string("x")
    assert matcher.accept_string('"}') and not ours._processes.locked() and not ours._threads.locked()


async def test_a_grammar_of_many_simultaneous_requests_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, compiled = grammars(), []
    compile_one = ours._compile_now
    monkeypatch.setattr(ours, "_compile_now", lambda key: compiled.append(key) or compile_one(key))
    wanted = Grammar(kind="json", text=json.dumps(SCHEMA))
    await asyncio.gather(*(ours.matcher(wanted) for _ in range(20)))
    assert len(compiled) == 1 and not ours._pending
    leaving = [asyncio.create_task(ours.matcher(HEAVY)) for _ in range(3)]
    process = await compiling()
    leaving[0].cancel()
    await asyncio.gather(leaving[0], return_exceptions=True)
    assert process.is_running()  # the others still wait
    for task in leaving[1:]:
        task.cancel()
    await asyncio.gather(*leaving, return_exceptions=True)
    await until(lambda: not process.is_running())


async def test_a_grammar_compiled_after_its_timeout_is_cached_for_later_requests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours, release = grammars(), threading.Event()
    compile_one = ours._compile_now
    monkeypatch.setattr(ours, "_compile_now", lambda key: release.wait(10) and compile_one(key))
    monkeypatch.setattr(module, "MAX_COMPILE_S", 0.1)
    wanted = Grammar(kind="regex", text="[0-9]+")
    with pytest.raises(BadRequest, match="takes longer than"):
        await ours.matcher(wanted)
    with pytest.raises(BadRequest, match="too long to compile"):
        await ours.matcher(wanted)
    release.set()
    await until(lambda: ours._kept.size > 0)
    await ours.matcher(wanted)


def test_slow_masks_of_all_answers_share_one_time_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    held_up = module.MaskBudget()
    assert [held_up.add(0.04) for _ in range(3)] == [True, True, False]
    now[0] += 1.0
    assert held_up.add(0.04) and not held_up.add(0.06)
    now[0] += 60.0
    assert held_up.add(0.1)


async def test_no_compile_slot_is_lost_when_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = grammars()

    def no_thread(*args: Any) -> Any:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as context:
        context.setattr(module, "detached", no_thread)
        for _ in range(5):
            with pytest.raises(RuntimeError):
                await ours.matcher(Grammar(kind="regex", text="a"))
    await ours.matcher(Grammar(kind="regex", text="a"))


async def test_a_compiler_that_cannot_start_in_time_raises_overloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_START_S", 0.001)
    ours = grammars()
    for _ in range(2):
        with pytest.raises(Overloaded, match="too busy to compile"):
            await ours.matcher(HEAVY)
