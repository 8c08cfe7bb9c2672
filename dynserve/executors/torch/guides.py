"""Grammars for the sampler: xgrammar compiles them for the model's vocabulary, a `Matcher` follows one answer.

Compiling is done in a thread of its own; matching in the engine's thread, between the logits and the draw.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from tokenizers import Tokenizer
from torch import Tensor

from dynserve.errors import BadRequest, InternalError, Overloaded
from dynserve.openai.detokenize import tokenizer_parts
from dynserve.wire.requests import Guide, Thought

if TYPE_CHECKING:
    import xgrammar

CACHE_BYTES = 256 << 20  # of compiled grammars
MAX_WAITING = 256  # grammars
MAX_THREADS = 4
MOST_WAIT, MOST_COMPILE = 10.0, 30.0  # seconds
MAX_KEPT = 128  # grammars
# seconds of a processor that the next token's mask may take: once, and (beyond a start) per token of the answer
MOST_AT_ONCE, MOST_SPENT, MOST_PER_TOKEN = 0.15, 1.0, 0.005
# JSON may have any white space between its parts; a model that is lost would fill its context with it
MOST_WHITESPACE = 32


_Key = tuple[str, str]  # kind and text
T = TypeVar("T")


class Guides:
    """Compiles grammars, each in a thread of its own: one that takes for ever holds up neither the others nor the process's
    end. xgrammar is imported with the first grammar."""

    def __init__(self, folder: Path, vocab_size: int, eos: Sequence[int]) -> None:
        self._folder, self._vocab_size, self._eos = folder, vocab_size, list(eos)
        self._threads = asyncio.Semaphore(MAX_THREADS)  # held as long as a thread is at work, waited for or not
        self._waiting = 0
        self._compiled: OrderedDict[_Key, xgrammar.CompiledGrammar] = OrderedDict()
        self._slow: OrderedDict[_Key, None] = OrderedDict()  # those that somebody has given up waiting for
        self._lock = threading.Lock()
        self._compiler: xgrammar.GrammarCompiler | None = None

    async def matcher(self, guide: Guide) -> Matcher:
        """What one answer follows the grammar with.

        Raises:
            BadRequest: the grammar is none, or takes too long to compile.
            Overloaded: too many wait for theirs.
        """
        key = (guide.kind, guide.text)
        compiled = self._compiled.get(key)
        if compiled is None:
            compiled = await self._compile(key)
        else:
            self._compiled.move_to_end(key)
        import xgrammar  # a second's work, done by the thread that compiled

        return Matcher(xgrammar.GrammarMatcher(compiled), self._vocab_size, self._eos, guide.thought)

    async def _compile(self, key: _Key) -> xgrammar.CompiledGrammar:
        if key in self._slow:
            raise BadRequest("this grammar takes too long to compile", param=_PARAM[key[0]])  # it did before
        if self._waiting >= MAX_WAITING:
            raise Overloaded(f"{self._waiting} grammars wait to be compiled")
        self._waiting += 1
        try:
            async with asyncio.timeout(MOST_WAIT):
                await self._threads.acquire()
        except TimeoutError:
            raise Overloaded("other grammars take long to compile; try again later") from None
        finally:
            self._waiting -= 1
        done = self._start(key)
        try:
            async with asyncio.timeout(MOST_COMPILE):
                return await done
        except TimeoutError:
            _remember(self._slow, key, None)
            message = f"this grammar takes longer than {MOST_COMPILE:.0f} s to compile"
            raise BadRequest(message, param=_PARAM[key[0]]) from None

    def _start(self, key: _Key) -> asyncio.Future[xgrammar.CompiledGrammar]:
        """A thread for one grammar, which gives back its place when it has ended."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[xgrammar.CompiledGrammar] = loop.create_future()

        def tell(compiled: xgrammar.CompiledGrammar | None, error: BaseException | None) -> None:
            self._threads.release()
            self._slow.pop(key, None)
            if compiled is not None:
                _remember(self._compiled, key, compiled)
            if done.cancelled():
                return
            if compiled is not None:
                done.set_result(compiled)
            else:
                done.set_exception(error or InternalError("no grammar came of it"))

        def work() -> None:
            compiled, failure = None, None
            try:
                compiled = self._compile_now(key)
            except BaseException as error:
                failure = error
            with contextlib.suppress(RuntimeError):  # the loop was closed under us: the process is ending
                loop.call_soon_threadsafe(tell, compiled, failure)

        try:
            threading.Thread(target=work, name="compile-grammar", daemon=True).start()
        except RuntimeError as error:  # no more threads are to be had
            tell(None, error)
        return done

    def _compile_now(self, key: _Key) -> xgrammar.CompiledGrammar:
        with self._lock:
            compiler = self._compiler = self._compiler or self._make_compiler()
        kind, text = key
        try:
            match kind:
                case "json":
                    return compiler.compile_json_schema(text, max_whitespace_cnt=MOST_WHITESPACE)
                case "regex":
                    return compiler.compile_regex(text)
                case "grammar":
                    return compiler.compile_grammar(text)
                case _:
                    return compiler.compile_structural_tag(json.dumps(_bounded(json.loads(text))))
        except (RuntimeError, ValueError, TypeError) as error:
            raise BadRequest(f"the grammar cannot be used: {_reason(error)}", param=_PARAM[kind]) from error

    def _make_compiler(self) -> xgrammar.GrammarCompiler:
        import xgrammar

        tokenizer = Tokenizer.from_file(str(self._folder / "tokenizer.json"))
        vocabulary = [""] * self._vocab_size
        for token, id_ in tokenizer.get_vocab().items():
            if id_ < self._vocab_size:
                vocabulary[id_] = token
        kind, prefix_space = _token_encoding(tokenizer)
        info = xgrammar.TokenizerInfo(
            vocabulary,
            vocab_type=getattr(xgrammar.VocabType, kind),
            vocab_size=self._vocab_size,
            stop_token_ids=self._eos,
            add_prefix_space=prefix_space,
        )
        return xgrammar.GrammarCompiler(info, max_threads=os.cpu_count() or 1, cache_limit_bytes=CACHE_BYTES)


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


def _remember(kept: OrderedDict[_Key, T], key: _Key, value: T) -> None:
    kept[key] = value
    if len(kept) > MAX_KEPT:
        kept.popitem(last=False)


_PARAM = {"json": "response_format", "regex": "guided_regex", "grammar": "guided_grammar", "structural_tag": "tools"}


def _token_encoding(tokenizer: Tokenizer) -> tuple[str, bool]:
    """How the vocabulary writes bytes, in xgrammar's words, and whether texts get a space in front."""
    found = json.dumps(tokenizer_parts(tokenizer))
    if '"ByteLevel"' in found:
        return "BYTE_LEVEL", '"add_prefix_space": true' in found
    prefix = '"Prepend"' in found or '"prepend_scheme": "first"' in found or '"prepend_scheme": "always"' in found
    return ("BYTE_FALLBACK" if '"ByteFallback"' in found else "RAW"), prefix


def _bounded(form: Any) -> Any:
    """A structural tag whose JSON has no more white space in a row than it may have elsewhere."""
    if isinstance(form, list):
        return [_bounded(item) for item in form]
    if not isinstance(form, dict):
        return form
    if form.get("type") == "json_schema":
        return {"max_whitespace_cnt": MOST_WHITESPACE} | form  # and no further: what is within is the client's schema
    return {key: _bounded(value) for key, value in form.items()}


def _reason(error: Exception) -> str:
    """The compiler's own sentence, without time and place."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return _PLACE.sub("", text)[:500]


_PLACE = re.compile(r"^(\[[\d:]+\] )?(\S+\.cc:\d+: )?")
