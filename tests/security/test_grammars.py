"""Grammars that take long or much memory cost their own request, and nothing stays of them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from dynserve.config import TINY_MODEL
from dynserve.errors import BadRequest
from dynserve.executors.torch import guides as module
from dynserve.executors.torch.grammar_weight import MAX_TEXT, weight
from dynserve.executors.torch.guides import LIGHT, Guides, _Kept
from dynserve.wire.requests import Guide
from tests.conftest import until

HEAVY = Guide(kind="regex", text="(([a-z]{0,400}x){0,400}y){0,50}")


def guides() -> Guides:
    return Guides(Path(TINY_MODEL), 2048, [2])


async def compiling() -> psutil.Process:
    """The process that compiles, once it is there."""
    found: list[psutil.Process] = []

    def there() -> bool:
        found[:] = [p for p in psutil.Process().children() if "grammar_compiler" in " ".join(p.cmdline())]
        return bool(found)

    await until(there)
    return found[0]


async def test_light_grammars_do_not_wait_for_heavy_ones() -> None:
    ours = guides()
    heavy = [asyncio.create_task(ours.matcher(Guide(kind="regex", text=HEAVY.text + "z" * i))) for i in range(6)]
    await compiling()
    for number in range(5):
        await ours.matcher(Guide(kind="json", text=json.dumps({"type": "object", "title": str(number)})))
    assert not any(task.done() for task in heavy)
    for task in heavy:
        task.cancel()
    await asyncio.gather(*heavy, return_exceptions=True)


async def test_a_grammar_that_is_given_up_is_not_compiled_any_further(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_COMPILE", 0.5)
    ours = guides()
    asked = asyncio.create_task(ours.matcher(HEAVY))
    process = await compiling()
    with pytest.raises(BadRequest, match="takes longer than"):
        await asked
    assert not process.is_running()
    with pytest.raises(BadRequest, match="too long to compile"):  # and nobody waits for it a second time
        await ours.matcher(HEAVY)


async def test_an_abandoned_request_ends_the_process_that_compiles_for_it() -> None:
    ours = guides()
    asked = asyncio.create_task(ours.matcher(HEAVY))
    process = await compiling()
    asked.cancel()
    await asyncio.gather(asked, return_exceptions=True)
    await until(lambda: not process.is_running())
    assert not ours._processes.locked()


async def test_a_process_that_dies_of_a_grammar_is_the_requests_fault() -> None:
    ours = guides()
    asked = asyncio.create_task(ours.matcher(HEAVY))
    process = await compiling()
    while process.memory_info().rss < 50 << 20:
        await asyncio.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(Exception, match="too much memory|did not start"):
        await asked


async def test_what_a_process_compiles_is_followed_like_what_a_thread_does() -> None:
    schema: dict[str, Any] = {"type": "array", "items": {"type": "string", "maxLength": 60}, "maxItems": 30}
    guide = Guide(kind="json", text=json.dumps(schema))
    assert weight(guide.kind, guide.text) > LIGHT
    ours = guides()
    matcher = (await ours.matcher(guide))._matcher
    assert matcher.accept_string('["') and not matcher.accept_string("x" * 61) and matcher.accept_string('x"]')
    with pytest.raises(BadRequest, match="^the grammar cannot be used: [^/]+$"):
        await ours.matcher(Guide(kind="regex", text="((" + "a{0,900}b{0,900}"))


def test_compiled_grammars_are_kept_up_to_so_many_bytes() -> None:
    class Compiled:
        memory_size_bytes = 300

    kept = _Kept(1000)
    keys = [("json", f"{n}") for n in range(5)]
    for key in keys[:3]:
        kept.add(key, Compiled())  # type: ignore[arg-type]
    assert kept.get(keys[0]) is not None  # so that the next oldest goes first
    kept.add(keys[3], Compiled())  # type: ignore[arg-type]
    assert [kept.get(key) is not None for key in keys] == [True, False, True, True, False] and kept.size <= 1000


@pytest.mark.parametrize(
    ("kind", "grammar", "light"),
    [
        ("json", {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(50)}}, True),
        ("json", {"type": "string", "maxLength": 400}, True),
        ("json", {"type": "object", "properties": {f"p{i}": {"type": "string", "maxLength": 64} for i in range(10)}}, False),
        ("json", {"type": "array", "maxItems": 50, "items": {"type": "array", "maxItems": 50, "items": {}}}, False),
        ("json", {"properties": {"a": {"pattern": "(a{0,60}){0,60}"}}}, False),
        ("regex", "[0-9]{3}-[0-9]{4}", True),
        ("regex", "(a{0,60}){0,60}", False),
        ("regex", "a{0,100000}", False),
        ("grammar", 'root ::= "a"{0,80} "b"{0,80}', False),
        ("structural_tag", {"format": {"type": "regex", "pattern": "(a{0,60}){0,60}"}}, False),
        ("json", {"enum": ["x" * MAX_TEXT]}, False),
    ],
)  # fmt: skip
def test_what_takes_long_is_known_beforehand(kind: str, grammar: Any, light: bool) -> None:
    text = grammar if isinstance(grammar, str) else json.dumps(grammar)
    assert (weight(kind, text) <= LIGHT) is light
