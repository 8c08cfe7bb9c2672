"""Grammars for the sampler: xgrammar compiles them for the model's vocabulary, a `Matcher` applies one to one answer.

Light grammars (see `grammar_weight`) are compiled in a thread, each heavy one in a process of its own, which can be killed.
The two kinds never wait for each other. Matching runs in the engine's thread, between the logits and the draw.
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
    QUICK,
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

CACHE_BYTES = 256 << 20  # upper bound of the cache of compiled grammars
# the `weight` up to which a thread compiles: LIGHT_WORK token checks, about a second, divided by the vocabulary
LIGHT_WORK, MIN_LIGHT, MAX_LIGHT = 8_000_000, 32.0, 512.0
MAX_WAITING = 256  # grammars in the queue
MAX_THREADS = 2
MAX_PROCESSES = 2
MAX_WAIT_S, MAX_COMPILE_S = 10.0, 30.0  # seconds
MAX_START_S = 30.0  # seconds until a process must be ready to compile
PREPARE_AFTER = 5.0  # seconds from the start
END_TIMEOUT = 2.0  # seconds to wait for a cancelled compilation to end
MAX_SLOW, SLOW_TTL = 1024, 600.0  # grammars remembered as too slow, and for how many seconds
# upper bounds of the CPU seconds for masks: for one mask; for one answer, a constant plus a part per token
MAX_MASK_S, MAX_SPENT_S, MAX_PER_TOKEN_S = 0.05, 1.0, 0.005
# seconds that masks of all answers may delay the steps, and their refill per second; masks up to SLOW_MASK do not count
SLOW_MASK, MAX_HELD_UP_S, HELD_UP_PER_S = 0.01, 0.1, 0.1


log = logging.getLogger(__name__)

_Key = tuple[str, str, str]  # kind, text and rules


class CompiledGrammars:
    """The compiled grammars of one model, by kind, text and rules. xgrammar is imported when the first one is compiled."""

    def __init__(self, folder: Path, vocab_size: int, eos: Sequence[int]) -> None:
        self._vocabulary = GrammarVocabulary(str(folder), vocab_size, list(eos))
        self._max_light = min(MAX_LIGHT, max(MIN_LIGHT, LIGHT_WORK / vocab_size))
        self._threads = asyncio.Semaphore(MAX_THREADS)  # held until the thread ends, even after a timeout
        self._processes = asyncio.Semaphore(MAX_PROCESSES)
        self._waiting = 0
        self._kept = _GrammarCache(CACHE_BYTES)
        self._pending: dict[_Key, _Compilation] = {}
        self._slow: OrderedDict[_Key, float] = OrderedDict()  # grammars that took too long, and when
        self._held_up = MaskBudget()
        self._lock = threading.Lock()
        self._compiler: Compiler | None = None

    async def prepare(self, after: float = PREPARE_AFTER) -> None:
        """Imports the compiler after `after` seconds, so that the first request with a grammar does not wait for it. The
        import holds the interpreter lock for some tenths of a second."""
        await asyncio.sleep(after)
        try:
            await detached(self._own_compiler)
        except Exception as error:  # requests with a grammar will get it
            log.warning("grammars cannot be compiled, so requests with one will fail: %r", error)

    async def matcher(self, grammar: Grammar) -> Matcher:
        """Returns the matcher of one answer, after compiling the grammar if it is not cached.

        Raises:
            BadRequest: the grammar is invalid, or takes too long or too much memory to compile.
            Overloaded: too many grammars are queued, or this one could not start in time.
        """
        key = (grammar.kind, grammar.text, grammar.rules)
        compiled = self._kept.get(key) or await self._shared(key)
        import xgrammar  # takes a second, but the compiling thread has done it

        eos = list(self._vocabulary.eos)
        matcher = xgrammar.GrammarMatcher(compiled)
        return Matcher(matcher, self._vocabulary.vocab_size, eos, grammar.reasoning, self._held_up)

    async def _shared(self, key: _Key) -> xgrammar.CompiledGrammar:
        """Shares one compilation among all requests for a grammar; it is cancelled when none of them waits any more."""
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
            task.exception()  # retrieved: the waiting requests may have been aborted

    async def _compile(self, key: _Key) -> xgrammar.CompiledGrammar:
        self._refuse_slow(key)
        if self._waiting >= MAX_WAITING:
            raise Overloaded(f"{self._waiting} grammars are queued for compilation; try again later")
        light = weight(*key) <= self._max_light
        await self._admit(self._threads if light else self._processes)
        try:
            if not light:
                compiled = await self._in_process(key)
                if compiled is not None:
                    return compiled
                await self._admit(self._threads)
            return await self._in_thread(key)
        except TimeoutError:
            self._slow[key] = time.monotonic()
            if len(self._slow) > MAX_SLOW:
                self._slow.popitem(last=False)
            message = f"this grammar takes longer than {MAX_COMPILE_S:.0f} s to compile; simplify it"
            raise BadRequest(message, param=PARAMS[key[0]]) from None

    async def _admit(self, lane: asyncio.Semaphore) -> None:
        """Waits for a place. Raises Overloaded if there is none in time."""
        self._waiting += 1
        try:
            async with asyncio.timeout(MAX_WAIT_S):
                await lane.acquire()
        except TimeoutError:
            raise Overloaded(
                f"this grammar was queued for {MAX_WAIT_S:.0f} s behind other grammars; try again later"
            ) from None
        finally:
            self._waiting -= 1

    def _refuse_slow(self, key: _Key) -> None:
        """Raises BadRequest for a grammar whose compilation took too long recently."""
        found = self._slow.get(key)
        if found is None:
            return
        if time.monotonic() - found < SLOW_TTL:
            raise BadRequest("this grammar takes too long to compile; simplify it", param=PARAMS[key[0]])
        del self._slow[key]

    async def _in_thread(self, key: _Key) -> xgrammar.CompiledGrammar:
        """Compiles in a thread. Raises TimeoutError; the thread then runs on and holds the semaphore until it ends."""
        try:
            done = detached(self._compile_now, key)
        except BaseException:
            self._threads.release()
            raise
        done.add_done_callback(partial(self._thread_ended, key))
        async with asyncio.timeout(MAX_COMPILE_S):
            return self._checked(key, await asyncio.shield(done))

    def _thread_ended(self, key: _Key, done: asyncio.Future[xgrammar.CompiledGrammar]) -> None:
        """Releases the semaphore and caches the result, even one that came too late, for the next request."""
        self._threads.release()
        if not done.cancelled() and done.exception() is None and done.result().memory_size_bytes <= MAX_BYTES:
            self._slow.pop(key, None)
            self._kept.add(key, done.result())

    async def _in_process(self, key: _Key) -> xgrammar.CompiledGrammar | None:
        """Compiles in a process, which is always killed at the end. Returns None if that was quick: compiling it again
        takes less time and memory than passing it on. Raises TimeoutError."""
        try:
            answer = await _compiled_elsewhere(self._vocabulary, key)
            if answer[:1] == REFUSED:
                raise BadRequest(answer[1:].decode("utf-8", "replace"), param=PARAMS[key[0]])
            if answer[:1] == QUICK:
                return None
            if answer[:1] != COMPILED:
                raise BadRequest("this grammar takes too much memory to compile; simplify it", param=PARAMS[key[0]])
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
    """A running compilation and the number of requests that wait for it."""

    def __init__(self, task: asyncio.Task[xgrammar.CompiledGrammar]) -> None:
        self.task, self.waiting = task, 0


class _GrammarCache:
    """The compiled grammars that were used last, up to `max_bytes` bytes in total."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self.size = max_bytes, 0  # bytes
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
        while self.size > self._max_bytes:
            self.size -= _size(*self._grammars.popitem(last=False))


def _size(key: _Key, compiled: xgrammar.CompiledGrammar) -> int:
    return compiled.memory_size_bytes + 4 * (len(key[1]) + len(key[2]))


async def _compiled_elsewhere(vocabulary: GrammarVocabulary, key: _Key) -> bytes:
    """Returns the output of a process that compiles this one grammar; empty if it died. Raises TimeoutError."""
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
            return await detached(_communicate, process, json.dumps(key).encode())
    finally:
        process.kill()
        detached(_reap, process)


def _end_unwanted(spawned: asyncio.Future[subprocess.Popen[bytes]]) -> None:
    """Kills a process whose request was aborted while it was being started."""
    if not spawned.cancelled() and spawned.exception() is None:
        spawned.result().kill()
        detached(_reap, spawned.result())


def _spawn(vocabulary: GrammarVocabulary) -> subprocess.Popen[bytes]:
    """Starts a compiler process with vfork, which copies no page tables: copying gigabytes of them would stall all
    requests, and asyncio would start the process on the event loop."""
    command = [sys.executable, "-m", "dynserve.executors.torch.grammar_compiler", json.dumps(vocabulary)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def _first_byte(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout is not None
    return os.read(process.stdout.fileno(), 1)


def _communicate(process: subprocess.Popen[bytes], text: bytes) -> bytes:
    try:
        return process.communicate(text)[0]
    except (OSError, ValueError):  # the process died or was killed
        return b""


def _reap(process: subprocess.Popen[bytes]) -> None:
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError, ValueError):
                pipe.close()


class MaskBudget:
    """The seconds by which slow masks have delayed the steps lately, less `HELD_UP_PER_S` for each second since."""

    def __init__(self) -> None:
        self._seconds, self._at = 0.0, time.monotonic()

    def add(self, seconds: float) -> bool:
        """Adds the time of one mask. Returns True if the total is within the bound."""
        now = time.monotonic()
        self._seconds = max(0.0, self._seconds - (now - self._at) * HELD_UP_PER_S) + seconds
        self._at = now
        return self._seconds <= MAX_HELD_UP_S


class Matcher:
    """The state of one answer in its grammar. During the model's reasoning, all tokens but the end tokens are allowed.

    Masks are computed between two steps of the whole batch, so a grammar with slow masks fails its request.
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
        self._ends_there: Tensor | None = None  # end tokens, on the device of the logits
        self._seen = 0
        self._spent = 0.0  # seconds
        self._in_reasoning = reasoning is not None and reasoning.open

    def mask(self, tokens: Sequence[int], prompt_len: int, logits: Tensor) -> None:
        """Sets the logits (`[vocab]`) of all tokens that may not come after `tokens` to minus infinity.

        Raises:
            BadRequest: the masks of this grammar take too long.
        """
        began = time.thread_time()
        self._mask(tokens, prompt_len, logits)
        spent = time.thread_time() - began
        self._spent += spent
        crowded = spent > SLOW_MASK and not self._held_up.add(spent)
        if crowded or spent > MAX_MASK_S or self._spent > MAX_SPENT_S + MAX_PER_TOKEN_S * self._seen:
            raise BadRequest("this grammar takes too long to follow; simplify its nested repetitions")

    def _mask(self, tokens: Sequence[int], prompt_len: int, logits: Tensor) -> None:
        for token in tokens[prompt_len + self._seen :]:
            self._accept(token)
        if self._in_reasoning:
            # an answer of reasoning alone would escape the grammar
            logits.index_fill_(0, self._ends(logits), float("-inf"))
            return
        if self._matcher.is_terminated():
            self._only_the_end(logits)
            return
        before = logits.clone() if not self._seen and self._reasoning is not None else None
        forbids = self._matcher.fill_next_token_bitmask(self._bitmask)
        if forbids:
            self._forbid(logits)
        if before is not None and self._reasoning is not None:  # the model may reason first or answer at once
            logits[self._reasoning.begin] = before[self._reasoning.begin]
        if forbids and self._dead_end(logits, before is not None):
            self._only_the_end(logits)

    def _forbid(self, logits: Tensor) -> None:
        """Sets the logits of tokens whose bits are not set to minus infinity."""
        if not logits.is_cuda:
            self._apply(logits, self._bitmask[0])
            return
        if not self._bitmask.is_pinned():  # or each copy would wait for the earlier steps
            self._bitmask = self._bitmask.pin_memory()
        forbid_on_gpu(logits, self._bitmask[0])

    def _dead_end(self, logits: Tensor, may_reason: bool) -> bool:
        """Whether no token of the vocabulary can continue the grammar here."""
        if logits.is_cuda:  # reading the logits would wait for the device
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
    """Does with torch what xgrammar's own kernel does, which would be compiled and stall all steps at the first grammar."""
    words = bitmask.to(logits.device, non_blocking=True)
    bits = (words[:, None] >> torch.arange(32, dtype=torch.int32, device=logits.device)) & 1
    logits.masked_fill_(bits.view(-1)[: len(logits)] == 0, float("-inf"))


def warm_up(vocab_size: int, device: torch.device) -> None:
    """Loads the code for masks into a GPU, so that the first mask is not counted as slow."""
    logits = torch.zeros(vocab_size, device=device)
    forbid_on_gpu(logits, torch.zeros(-(-vocab_size // 32), dtype=torch.int32).pin_memory())
    logits.index_fill_(0, torch.zeros(1, dtype=torch.long, device=device), 0.0)
    torch.cuda.synchronize(device)
