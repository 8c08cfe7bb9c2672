"""Grammars for the sampler: xgrammar compiles them for the model's vocabulary, a `Matcher` follows one answer.

Grammars that are quickly compiled (`grammar_weight`) are compiled in a thread, the others in a process each, which can be
ended: they never wait for each other. Matching is done in the engine's thread, between the logits and the draw.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import subprocess
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

from dynserve.errors import BadRequest, InternalError, Overloaded
from dynserve.executors.torch.grammar_compiler import (
    COMPILED,
    MAX_BYTES,
    PARAMS,
    READY,
    REFUSED,
    Compiler,
    GrammarVocabulary,
    compile_grammar,
    make_compiler,
    too_large,
)
from dynserve.executors.torch.grammar_weight import weight
from dynserve.tasks import detached
from dynserve.wire.requests import Grammar, ReasoningTokens

if TYPE_CHECKING:
    import xgrammar

CACHE_BYTES = 256 << 20  # of compiled grammars that are kept
# what a thread may compile, by `weight`: so many looks at a token, about a second's work
LIGHT_WORK, MIN_LIGHT, MAX_LIGHT = 8_000_000, 32.0, 512.0
MAX_WAITING = 256  # grammars
MAX_THREADS = 2
MAX_PROCESSES = 2
MAX_WAIT_S, MAX_COMPILE_S = 10.0, 30.0  # seconds
MAX_START_S = 30.0  # seconds until a process can begin to compile
PREPARE_AFTER = 5.0  # seconds from the start
END_TIMEOUT = 2.0  # seconds that the end of one is waited for
MAX_SLOW, SLOW_TTL = 1024, 600.0  # grammars that are remembered for having taken too long, and for how many seconds
# seconds of a processor that the next token's mask may take: once, and (beyond a start) per token of the answer
MAX_MASK_S, MAX_SPENT_S, MAX_PER_TOKEN_S = 0.05, 1.0, 0.005
# seconds that the masks of all answers together may hold up the steps: a mask of up to SLOW_MASK is usual, and not counted
SLOW_MASK, MAX_HELD_UP_S, HELD_UP_PER_S = 0.01, 0.1, 0.1


log = logging.getLogger(__name__)

_Key = tuple[str, str]  # kind and text


class CompiledGrammars:
    """Compiled grammars of one model, by their text. xgrammar is imported with the first one."""

    def __init__(self, folder: Path, vocab_size: int, eos: Sequence[int]) -> None:
        self._vocabulary = GrammarVocabulary(str(folder), vocab_size, list(eos))
        self._most_light = min(MAX_LIGHT, max(MIN_LIGHT, LIGHT_WORK / vocab_size))
        self._threads = asyncio.Semaphore(MAX_THREADS)  # held as long as a thread is at work, waited for or not
        self._processes = asyncio.Semaphore(MAX_PROCESSES)
        self._waiting = 0
        self._kept = _GrammarCache(CACHE_BYTES)
        self._pending: dict[_Key, _Compilation] = {}
        self._slow: OrderedDict[_Key, float] = OrderedDict()  # those that took too long, and when
        self._held_up = MaskBudget()
        self._lock = threading.Lock()
        self._compiler: Compiler | None = None

    async def prepare(self, after: float = PREPARE_AFTER) -> None:
        """Imports the compiler `after` so many seconds, so that no request has to wait for it, whoever sent the first
        grammar. Importing holds the interpreter for some tenths of a second."""
        await asyncio.sleep(after)
        try:
            await detached(self._own_compiler)
        except Exception as error:  # whoever sends a grammar is told
            log.warning("grammars cannot be compiled here: %r", error)

    async def matcher(self, grammar: Grammar) -> Matcher:
        """What one answer follows the grammar with.

        Raises:
            BadRequest: the grammar is none, or takes too long or too much memory to compile.
            Overloaded: too many wait for theirs.
        """
        key = (grammar.kind, grammar.text)
        compiled = self._kept.get(key) or await self._shared(key)
        import xgrammar  # a second's work, done by the thread that compiled

        eos = list(self._vocabulary.eos)
        matcher = xgrammar.GrammarMatcher(compiled)
        return Matcher(matcher, self._vocabulary.vocab_size, eos, grammar.reasoning, self._held_up)

    async def _shared(self, key: _Key) -> xgrammar.CompiledGrammar:
        """One compilation for all that wait for the same grammar; it ends when nobody does any more."""
        pending = self._pending.get(key)
        if pending is None:
            pending = self._pending[key] = _Compilation(asyncio.create_task(self._compile(key)))
            pending.task.add_done_callback(partial(self._ended, key))
        pending.waiting += 1
        try:
            return await asyncio.shield(pending.task)
        finally:
            pending.waiting -= 1
            if not pending.waiting and not pending.task.done():
                self._forget(key, pending.task)
                pending.task.cancel()
                await asyncio.wait([pending.task], timeout=END_TIMEOUT)

    def _forget(self, key: _Key, task: asyncio.Task[xgrammar.CompiledGrammar]) -> None:
        if (pending := self._pending.get(key)) is not None and pending.task is task:
            del self._pending[key]

    def _ended(self, key: _Key, task: asyncio.Task[xgrammar.CompiledGrammar]) -> None:
        self._forget(key, task)
        if not task.cancelled():
            task.exception()  # whoever waited may have gone

    async def _compile(self, key: _Key) -> xgrammar.CompiledGrammar:
        self._refuse_slow(key)
        if self._waiting >= MAX_WAITING:
            raise Overloaded(f"{self._waiting} grammars wait to be compiled")
        light = weight(*key) <= self._most_light
        lane = self._threads if light else self._processes
        self._waiting += 1
        try:
            async with asyncio.timeout(MAX_WAIT_S):
                await lane.acquire()
        except TimeoutError:
            raise Overloaded("other grammars take long to compile; try again later") from None
        finally:
            self._waiting -= 1
        try:
            return await (self._in_thread(key) if light else self._in_process(key))
        except TimeoutError:
            self._slow[key] = time.monotonic()
            if len(self._slow) > MAX_SLOW:
                self._slow.popitem(last=False)
            message = f"this grammar takes longer than {MAX_COMPILE_S:.0f} s to compile"
            raise BadRequest(message, param=PARAMS[key[0]]) from None

    def _refuse_slow(self, key: _Key) -> None:
        """Raises BadRequest for a grammar that took too long a short while ago."""
        found = self._slow.get(key)
        if found is None:
            return
        if time.monotonic() - found < SLOW_TTL:
            raise BadRequest("this grammar takes too long to compile", param=PARAMS[key[0]])
        del self._slow[key]

    async def _in_thread(self, key: _Key) -> xgrammar.CompiledGrammar:
        """Raises TimeoutError; the thread goes on, and keeps its place until it has ended."""
        try:
            done = detached(self._compile_now, key)
        except BaseException:
            self._threads.release()
            raise
        done.add_done_callback(partial(self._thread_ended, key))
        async with asyncio.timeout(MAX_COMPILE_S):
            return self._checked(key, await asyncio.shield(done))

    def _thread_ended(self, key: _Key, done: asyncio.Future[xgrammar.CompiledGrammar]) -> None:
        """Gives the thread's place back, and keeps a result that came too late for the next request."""
        self._threads.release()
        if not done.cancelled() and done.exception() is None and done.result().memory_size_bytes <= MAX_BYTES:
            self._slow.pop(key, None)
            self._kept.add(key, done.result())

    async def _in_process(self, key: _Key) -> xgrammar.CompiledGrammar:
        """Raises TimeoutError; the process is ended, whatever happens."""
        try:
            answer = await _compiled_elsewhere(self._vocabulary, key)
            if answer[:1] == REFUSED:
                raise BadRequest(answer[1:].decode("utf-8", "replace"), param=PARAMS[key[0]])
            if answer[:1] != COMPILED:
                raise BadRequest("this grammar takes too much memory to compile", param=PARAMS[key[0]])
            compiled = self._checked(key, await detached(self._read, answer))
        finally:
            self._processes.release()
        self._kept.add(key, compiled)
        return compiled

    @staticmethod
    def _checked(key: _Key, compiled: xgrammar.CompiledGrammar) -> xgrammar.CompiledGrammar:
        if compiled.memory_size_bytes > MAX_BYTES:
            raise BadRequest(too_large(compiled.memory_size_bytes), param=PARAMS[key[0]])
        return compiled

    def _read(self, answer: bytes) -> xgrammar.CompiledGrammar:
        import xgrammar

        serialized = answer[len(COMPILED) :].decode()
        return xgrammar.CompiledGrammar.deserialize_json(serialized, self._own_compiler().info)

    def _compile_now(self, key: _Key) -> xgrammar.CompiledGrammar:
        return compile_grammar(self._own_compiler(), *key)

    def _own_compiler(self) -> Compiler:
        with self._lock:
            if self._compiler is None:
                self._compiler = make_compiler(self._vocabulary, max_threads=os.cpu_count() or 1)
            return self._compiler


class _Compilation:
    """A compilation, and how many wait for it."""

    def __init__(self, task: asyncio.Task[xgrammar.CompiledGrammar]) -> None:
        self.task, self.waiting = task, 0


class _GrammarCache:
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
    """The answer of a process that compiles this grammar alone; empty when it died of it. Raises TimeoutError."""
    spawned = detached(_spawn, vocabulary)
    try:
        process = await asyncio.shield(spawned)
    except asyncio.CancelledError:
        spawned.add_done_callback(_end_unwanted)
        raise
    try:
        try:
            async with asyncio.timeout(MAX_START_S):
                ready = await detached(_first_byte, process)
        except TimeoutError:
            raise Overloaded("this machine is too busy to compile a grammar; try again later") from None
        if ready != READY:
            raise InternalError("the process that compiles grammars did not start")
        async with asyncio.timeout(MAX_COMPILE_S):
            return await detached(_talk, process, json.dumps(key).encode())
    finally:
        process.kill()
        detached(_reap, process)


def _end_unwanted(spawned: asyncio.Future[subprocess.Popen[bytes]]) -> None:
    """Ends a process whose request was given up while it was being started."""
    if not spawned.cancelled() and spawned.exception() is None:
        spawned.result().kill()
        detached(_reap, spawned.result())


def _spawn(vocabulary: GrammarVocabulary) -> subprocess.Popen[bytes]:
    """With vfork, and so without a look at this process's memory: a copy of gigabytes of page tables holds up everybody,
    and asyncio's way of starting processes makes one on the event loop."""
    command = [sys.executable, "-m", "dynserve.executors.torch.grammar_compiler", json.dumps(vocabulary)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def _first_byte(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout is not None
    return os.read(process.stdout.fileno(), 1)


def _talk(process: subprocess.Popen[bytes], text: bytes) -> bytes:
    try:
        return process.communicate(text)[0]
    except (OSError, ValueError):  # it has died, or was ended
        return b""


def _reap(process: subprocess.Popen[bytes]) -> None:
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError, ValueError):
                pipe.close()


class MaskBudget:
    """The time by which slow masks have held up everybody's steps lately, and which is forgiven steadily."""

    def __init__(self) -> None:
        self._seconds, self._at = 0.0, time.monotonic()

    def add(self, seconds: float) -> bool:
        """Whether there was room for that."""
        now = time.monotonic()
        self._seconds = max(0.0, self._seconds - (now - self._at) * HELD_UP_PER_S) + seconds
        self._at = now
        return self._seconds <= MAX_HELD_UP_S


class Matcher:
    """One answer on its way through a grammar. While the model thinks, anything goes but the end.

    What may come next is found out between two steps of everyone's: a grammar for which that takes long ends its request.
    """

    def __init__(
        self,
        matcher: xgrammar.GrammarMatcher,
        vocab_size: int,
        eos: list[int],
        reasoning: ReasoningTokens | None,
        held_up: MaskBudget,
    ) -> None:
        import xgrammar

        self._matcher, self._vocab_size, self._eos, self._reasoning = matcher, vocab_size, eos, reasoning
        self._held_up = held_up
        self._apply = xgrammar.apply_token_bitmask_inplace
        self._bitmask = xgrammar.allocate_token_bitmask(1, vocab_size)
        self._ends_there: Tensor | None = None  # end tokens, where the logits are
        self._seen = 0
        self._spent = 0.0  # seconds
        self._in_reasoning = reasoning is not None and reasoning.open

    def mask(self, tokens: Sequence[int], prompt_len: int, logits: Tensor) -> None:
        """Sets the logits (`[vocab]`) of all tokens that may not come after `tokens` to minus infinity.

        Raises:
            BadRequest: that takes too long with this grammar.
        """
        began = time.thread_time()
        self._mask(tokens, prompt_len, logits)
        spent = time.thread_time() - began
        self._spent += spent
        crowded = spent > SLOW_MASK and not self._held_up.add(spent)
        if crowded or spent > MAX_MASK_S or self._spent > MAX_SPENT_S + MAX_PER_TOKEN_S * self._seen:
            raise BadRequest("this grammar takes too long to follow; simplify what repeats within it")

    def _mask(self, tokens: Sequence[int], prompt_len: int, logits: Tensor) -> None:
        for token in tokens[prompt_len + self._seen :]:
            self._accept(token)
        if self._in_reasoning:
            # an answer of nothing but a thought would escape the grammar
            logits.index_fill_(0, self._ends(logits), float("-inf"))
            return
        if self._matcher.is_terminated():
            self._only_the_end(logits)
            return
        before = logits.clone() if not self._seen and self._reasoning is not None else None
        forbids = self._matcher.fill_next_token_bitmask(self._bitmask)
        if forbids:
            self._forbid(logits)
        if before is not None and self._reasoning is not None:  # it may think first, or begin to answer at once
            logits[self._reasoning.begin] = before[self._reasoning.begin]
        if forbids and self._dead_end(logits, before is not None):
            self._only_the_end(logits)

    def _forbid(self, logits: Tensor) -> None:
        """Sets the logits of tokens whose bits are not set to minus infinity."""
        if not logits.is_cuda:
            self._apply(logits, self._bitmask[0])
            return
        if not self._bitmask.is_pinned():  # or each copy would wait for the steps that were begun before
            self._bitmask = self._bitmask.pin_memory()
        forbid_on_gpu(logits, self._bitmask[0])

    def _dead_end(self, logits: Tensor, may_reason: bool) -> bool:
        """Whether nothing that the vocabulary can spell goes on from here."""
        if logits.is_cuda:  # which is not waited for
            return not may_reason and not bool(self._bitmask.any())
        return not bool(torch.isfinite(logits).any())

    def _accept(self, token: int) -> None:
        reasoning = self._reasoning
        first, self._seen = not self._seen, self._seen + 1
        if reasoning is not None and first and token == reasoning.begin:
            self._in_reasoning = True
        elif self._in_reasoning and reasoning is not None:
            self._in_reasoning = token != reasoning.end
        elif not self._matcher.is_terminated():
            self._matcher.accept_token(token)

    def _only_the_end(self, logits: Tensor) -> None:
        logits.fill_(float("-inf"))
        logits.index_fill_(0, self._ends(logits), 0.0)

    def _ends(self, logits: Tensor) -> Tensor:
        if self._ends_there is None or self._ends_there.device != logits.device:
            self._ends_there = torch.tensor(self._eos, dtype=torch.long, device=logits.device)
        return self._ends_there


def forbid_on_gpu(logits: Tensor, bitmask: Tensor) -> None:
    """The same as xgrammar's, by torch: xgrammar's own kernel would be compiled with the first grammar, while all wait."""
    words = bitmask.to(logits.device, non_blocking=True)
    bits = (words[:, None] >> torch.arange(32, dtype=torch.int32, device=logits.device)) & 1
    logits.masked_fill_(bits.view(-1)[: len(logits)] == 0, float("-inf"))


def warm_up(vocab_size: int, device: torch.device) -> None:
    """Loads what masks need into a GPU, so that the first grammar does not seem slow to follow."""
    logits = torch.zeros(vocab_size, device=device)
    forbid_on_gpu(logits, torch.zeros(-(-vocab_size // 32), dtype=torch.int32).pin_memory())
    logits.index_fill_(0, torch.zeros(1, dtype=torch.long, device=device), 0.0)
    torch.cuda.synchronize(device)
