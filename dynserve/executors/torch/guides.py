"""Grammars for the sampler: xgrammar compiles them for the model's vocabulary, a `Matcher` follows one answer.

Grammars that are quickly compiled (`grammar_weight`) are compiled in a thread, the others in a process each, which can be
ended: they never wait for each other. Matching is done in the engine's thread, between the logits and the draw.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dynserve.child import die_with_parent
from dynserve.errors import BadRequest, InternalError, Overloaded
from dynserve.executors.torch.grammar_compiler import (
    COMPILED,
    PARAMS,
    READY,
    REFUSED,
    Compiler,
    GrammarVocabulary,
    compile_grammar,
    make_compiler,
)
from dynserve.executors.torch.grammar_weight import weight
from dynserve.tasks import detached
from dynserve.wire.requests import Guide, Thought

if TYPE_CHECKING:
    import xgrammar

CACHE_BYTES = 256 << 20  # of compiled grammars that are kept
MAX_BYTES = 64 << 20  # of one compiled grammar
LIGHT = 512  # of `weight`: up to here a grammar is compiled in a thread
MAX_WAITING = 256  # grammars
MAX_THREADS = 2
MAX_PROCESSES = 2
MOST_WAIT, MOST_COMPILE = 10.0, 30.0  # seconds
MOST_START = 30.0  # seconds until a process can begin to compile
MAX_SLOW = 1024  # grammars that are remembered for having taken too long
# seconds of a processor that the next token's mask may take: once, and (beyond a start) per token of the answer
MOST_AT_ONCE, MOST_SPENT, MOST_PER_TOKEN = 0.15, 1.0, 0.005


_Key = tuple[str, str]  # kind and text


class Guides:
    """Compiled grammars of one model, by their text. xgrammar is imported with the first one."""

    def __init__(self, folder: Path, vocab_size: int, eos: Sequence[int]) -> None:
        self._vocabulary = GrammarVocabulary(str(folder), vocab_size, list(eos))
        self._threads = asyncio.Semaphore(MAX_THREADS)  # held as long as a thread is at work, waited for or not
        self._processes = asyncio.Semaphore(MAX_PROCESSES)
        self._waiting = 0
        self._kept = _Kept(CACHE_BYTES)
        self._slow: OrderedDict[_Key, None] = OrderedDict()  # those that somebody has given up waiting for
        self._lock = threading.Lock()
        self._compiler: Compiler | None = None

    async def matcher(self, guide: Guide) -> Matcher:
        """What one answer follows the grammar with.

        Raises:
            BadRequest: the grammar is none, or takes too long or too much memory to compile.
            Overloaded: too many wait for theirs.
        """
        key = (guide.kind, guide.text)
        compiled = self._kept.get(key)
        if compiled is None:
            compiled = await self._compile(key)
        import xgrammar  # a second's work, done by the thread that compiled

        eos = list(self._vocabulary.eos)
        return Matcher(xgrammar.GrammarMatcher(compiled), self._vocabulary.vocab_size, eos, guide.thought)

    async def _compile(self, key: _Key) -> xgrammar.CompiledGrammar:
        if key in self._slow:
            raise BadRequest("this grammar takes too long to compile", param=PARAMS[key[0]])  # it did before
        if self._waiting >= MAX_WAITING:
            raise Overloaded(f"{self._waiting} grammars wait to be compiled")
        light = weight(*key) <= LIGHT
        lane = self._threads if light else self._processes
        self._waiting += 1
        try:
            async with asyncio.timeout(MOST_WAIT):
                await lane.acquire()
        except TimeoutError:
            raise Overloaded("other grammars take long to compile; try again later") from None
        finally:
            self._waiting -= 1
        try:
            compiled = await (self._in_thread(key) if light else self._in_process(key))
        except TimeoutError:
            self._slow[key] = None
            if len(self._slow) > MAX_SLOW:
                self._slow.popitem(last=False)
            message = f"this grammar takes longer than {MOST_COMPILE:.0f} s to compile"
            raise BadRequest(message, param=PARAMS[key[0]]) from None
        if compiled.memory_size_bytes > MAX_BYTES:
            size = compiled.memory_size_bytes >> 20
            message = f"this grammar takes {size} MiB when compiled; {MAX_BYTES >> 20} are possible"
            raise BadRequest(message, param=PARAMS[key[0]])
        self._kept.add(key, compiled)
        return compiled

    async def _in_thread(self, key: _Key) -> xgrammar.CompiledGrammar:
        """Raises TimeoutError; the thread goes on, and keeps its place until it has ended."""
        done = detached(self._compile_now, key)
        done.add_done_callback(partial(self._thread_ended, key))
        async with asyncio.timeout(MOST_COMPILE):
            return await asyncio.shield(done)

    def _thread_ended(self, key: _Key, done: asyncio.Future[xgrammar.CompiledGrammar]) -> None:
        self._threads.release()
        self._slow.pop(key, None)
        if not done.cancelled():
            done.exception()  # whoever waited may have gone

    async def _in_process(self, key: _Key) -> xgrammar.CompiledGrammar:
        """Raises TimeoutError; the process is ended, whatever happens."""
        try:
            answer = await _compiled_elsewhere(self._vocabulary, key)
        finally:
            self._processes.release()
        if answer[:1] == REFUSED:
            raise BadRequest(answer[1:].decode("utf-8", "replace"), param=PARAMS[key[0]])
        if answer[:1] != COMPILED:
            raise BadRequest("this grammar takes too much memory to compile", param=PARAMS[key[0]])
        return await detached(self._read, answer[1:])

    def _read(self, serialized: bytes) -> xgrammar.CompiledGrammar:
        import xgrammar

        return xgrammar.CompiledGrammar.deserialize_json(serialized.decode(), self._own_compiler().info)

    def _compile_now(self, key: _Key) -> xgrammar.CompiledGrammar:
        return compile_grammar(self._own_compiler(), *key)

    def _own_compiler(self) -> Compiler:
        with self._lock:
            if self._compiler is None:
                self._compiler = make_compiler(self._vocabulary, max_threads=os.cpu_count() or 1)
            return self._compiler


class _Kept:
    """Compiled grammars, those that were used last, up to so many bytes together."""

    def __init__(self, most: int) -> None:
        self._most, self.size = most, 0  # bytes
        self._grammars: OrderedDict[_Key, xgrammar.CompiledGrammar] = OrderedDict()

    def get(self, key: _Key) -> xgrammar.CompiledGrammar | None:
        found = self._grammars.get(key)
        if found is not None:
            self._grammars.move_to_end(key)
        return found

    def add(self, key: _Key, compiled: xgrammar.CompiledGrammar) -> None:
        if key not in self._grammars:
            self._grammars[key] = compiled
            self.size += _size(key, compiled)
        while self.size > self._most:
            self.size -= _size(*self._grammars.popitem(last=False))


def _size(key: _Key, compiled: xgrammar.CompiledGrammar) -> int:
    return compiled.memory_size_bytes + 4 * len(key[1])


async def _compiled_elsewhere(vocabulary: GrammarVocabulary, key: _Key) -> bytes:
    """What a process of its own says to the grammar; nothing when it died of it. Raises TimeoutError."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "dynserve.executors.torch.grammar_compiler", json.dumps(vocabulary),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        preexec_fn=die_with_parent,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        async with asyncio.timeout(MOST_START):
            if await process.stdout.read(1) != READY:
                raise InternalError("the process that compiles grammars did not start")
        async with asyncio.timeout(MOST_COMPILE):
            answer, _ = await process.communicate(json.dumps(key).encode())
            return answer
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


class Matcher:
    """One answer on its way through a grammar. While the model thinks, anything goes but the end.

    What may come next is found out between two steps of everyone's: a grammar for which that takes long ends its request.
    """

    def __init__(
        self, matcher: xgrammar.GrammarMatcher, vocab_size: int, eos: list[int], thought: Thought | None
    ) -> None:
        import xgrammar

        self._matcher, self._vocab_size, self._eos, self._thought = matcher, vocab_size, eos, thought
        self._apply = xgrammar.apply_token_bitmask_inplace
        self._bitmask = xgrammar.allocate_token_bitmask(1, vocab_size)
        self._seen = 0
        self._spent = 0.0  # seconds
        self._thinking = thought is not None and thought.open

    def mask(self, tokens: Sequence[int], prompt_len: int, logits: Tensor) -> None:
        """Sets the logits (`[vocab]`) of all tokens that may not come after `tokens` to minus infinity.

        Raises:
            BadRequest: that takes too long with this grammar.
        """
        began = time.thread_time()
        self._mask(tokens, prompt_len, logits)
        spent = time.thread_time() - began
        self._spent += spent
        if spent > MOST_AT_ONCE or self._spent > MOST_SPENT + MOST_PER_TOKEN * self._seen:
            raise BadRequest("this grammar takes too long to follow; simplify what repeats within it")

    def _mask(self, tokens: Sequence[int], prompt_len: int, logits: Tensor) -> None:
        for token in tokens[prompt_len + self._seen :]:
            self._take(token)
        if self._thinking:
            logits[self._eos] = float("-inf")  # an answer of nothing but a thought would escape the grammar
            return
        if self._matcher.is_terminated():
            self._only_the_end(logits)
            return
        before = logits.clone() if not self._seen and self._thought is not None else None
        if self._matcher.fill_next_token_bitmask(self._bitmask):
            self._apply(logits, self._bitmask.to(logits.device)[0])
        if before is not None and self._thought is not None:  # it may think first, or begin to answer at once
            logits[self._thought.begin] = before[self._thought.begin]
        if not torch.isfinite(logits).any():  # a dead end: nothing that the vocabulary can spell goes on from here
            self._only_the_end(logits)

    def _take(self, token: int) -> None:
        thought = self._thought
        first, self._seen = not self._seen, self._seen + 1
        if thought is not None and first and token == thought.begin:
            self._thinking = True
        elif self._thinking and thought is not None:
            self._thinking = token != thought.end
        elif not self._matcher.is_terminated():
            self._matcher.accept_token(token)

    def _only_the_end(self, logits: Tensor) -> None:
        logits.fill_(float("-inf"))
        logits[self._eos] = 0.0
