"""xgrammar's compiler for one model's vocabulary; and, run as a program, the process that compiles one heavy grammar.

A process can be killed and its memory limited; a thread in the middle of a compilation cannot.
"""

from __future__ import annotations

import json
import os
import re
import resource
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from tokenizers import Tokenizer

from dynserve.errors import BadRequest
from dynserve.text.detokenize import tokenizer_parts

if TYPE_CHECKING:
    import xgrammar

# JSON allows any amount of white space between its parts; a degenerating model would fill its context with it
MAX_WHITESPACE = 32
MAX_BYTES = 64 << 20  # of one compiled grammar
MAX_CPU = 120  # seconds, including the start
MAX_MEMORY = 1 << 30  # bytes that a compiler process may allocate for one compilation
READY, COMPILED, REFUSED, QUICK = b"r", b"c", b"x", b"q"
QUICK_S = 2.0  # seconds of a compilation that its result is not worth passing on: its text is a hundred times larger
PARAMS = {"json": "response_format", "regex": "guided_regex", "grammar": "guided_grammar", "structural_tag": "tools"}


class GrammarVocabulary(NamedTuple):
    """The parts of a model that a grammar compiler needs."""

    folder: str
    vocab_size: int
    eos: Sequence[int]


class Compiler(NamedTuple):
    """xgrammar's compiler and its description of the vocabulary."""

    engine: xgrammar.GrammarCompiler
    info: xgrammar.TokenizerInfo


def make_compiler(vocabulary: GrammarVocabulary, max_threads: int) -> Compiler:
    """Imports xgrammar, which takes a second or more, and makes a compiler without a cache: its callers have one."""
    xgrammar = _import_xgrammar()
    tokenizer = Tokenizer.from_file(str(Path(vocabulary.folder) / "tokenizer.json"))
    tokens = [""] * vocabulary.vocab_size
    for token, id_ in tokenizer.get_vocab().items():
        if id_ < vocabulary.vocab_size:
            tokens[id_] = token
    kind, prefix_space = _token_encoding(tokenizer)
    info = xgrammar.TokenizerInfo(
        tokens,
        vocab_type=getattr(xgrammar.VocabType, kind),
        vocab_size=vocabulary.vocab_size,
        stop_token_ids=list(vocabulary.eos),
        add_prefix_space=prefix_space,
    )
    return Compiler(xgrammar.GrammarCompiler(info, max_threads=max_threads, cache_enabled=False), info)


def _import_xgrammar() -> Any:
    """Imports xgrammar with a substitute for transformers, of which it needs names for transformers' own tokenizers only.
    The real import would take twice as long as all the rest, in a process that answers requests."""
    if "xgrammar" not in sys.modules and "transformers" not in sys.modules:
        stand_in: Any = ModuleType("transformers")
        stand_in.PreTrainedTokenizerBase = stand_in.PreTrainedTokenizerFast = stand_in.LogitsProcessor = object
        sys.modules["transformers"] = stand_in
        try:
            return import_module("xgrammar")
        except Exception:  # this version needs more of transformers
            for name in [name for name in sys.modules if name.partition(".")[0] == "xgrammar"]:
                del sys.modules[name]
        finally:
            del sys.modules["transformers"]
    return import_module("xgrammar")


def compile_grammar(compiler: Compiler, kind: str, text: str, rules: str) -> xgrammar.CompiledGrammar:
    """Compiles a grammar. Raises BadRequest if the text is not a valid grammar of this kind."""
    try:
        match kind:
            case "json" if rules:
                return compiler.engine.compile_grammar(rules)
            case "structural_tag" if rules:
                return compiler.engine.compile_structural_tag(rules)
            case "json":
                return compiler.engine.compile_json_schema(text, max_whitespace_cnt=MAX_WHITESPACE)
            case "regex":
                return compiler.engine.compile_regex(text)
            case "grammar":
                return compiler.engine.compile_grammar(text)
            case _:
                return compiler.engine.compile_structural_tag(json.dumps(_bounded(json.loads(text))))
    except (RuntimeError, ValueError, TypeError) as error:
        raise BadRequest(f"the grammar cannot be used: {_reason(error)}", param=PARAMS[kind]) from error


def _token_encoding(tokenizer: Tokenizer) -> tuple[str, bool]:
    """Returns xgrammar's name of the vocabulary's byte encoding, and True if a space is put before each text."""
    found = json.dumps(tokenizer_parts(tokenizer))
    if '"ByteLevel"' in found:
        return "BYTE_LEVEL", '"add_prefix_space": true' in found
    prefix = '"Prepend"' in found or '"prepend_scheme": "first"' in found or '"prepend_scheme": "always"' in found
    return ("BYTE_FALLBACK" if '"ByteFallback"' in found else "RAW"), prefix


def _bounded(form: Any) -> Any:
    """Returns the structural tag with the white space in its JSON limited to `MAX_WHITESPACE`."""
    if isinstance(form, list):
        return [_bounded(item) for item in form]
    if not isinstance(form, dict):
        return form
    if form.get("type") == "json_schema":
        return {"max_whitespace_cnt": MAX_WHITESPACE} | form  # no deeper: the rest is the client's schema
    return {key: _bounded(value) for key, value in form.items()}


def _reason(error: Exception) -> str:
    """Returns the first line of the compiler's message, without its time and source position."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return _PLACE.sub("", text)[:500]


_PLACE = re.compile(r"^(\[[\d:]+\] )?(\S+\.cc:\d+: )?")


def main() -> None:
    """Compiles one grammar. The argument is the vocabulary as JSON. Writes READY to standard output, reads kind, text and
    rules as JSON from standard input, and writes the result: COMPILED and xgrammar's JSON, QUICK, or REFUSED and the
    reason."""
    vocabulary = GrammarVocabulary(*json.loads(sys.argv[1]))
    compiler = make_compiler(vocabulary, max_threads=1)
    out = sys.stdout.buffer
    out.write(READY)
    out.flush()
    kind, text, rules = json.loads(sys.stdin.buffer.read())
    os.nice(5)
    _limit_memory()
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_CPU, MAX_CPU))  # in case the parent dies and cannot kill this process
    try:
        began = time.process_time()
        compiled = compile_grammar(compiler, kind, text, rules)
        seconds = time.process_time() - began
        if compiled.memory_size_bytes > MAX_BYTES:
            out.write(REFUSED + too_large(compiled.memory_size_bytes).encode())
        elif seconds <= QUICK_S:
            out.write(QUICK)
        else:
            out.write(COMPILED + compiled.serialize_json().encode())
    except BadRequest as error:
        out.write(REFUSED + str(error).encode())
    out.flush()
    os._exit(0)  # without waiting for the libraries' threads


def too_large(size: int) -> str:
    return f"this grammar takes {size >> 20} MiB when compiled; at most {MAX_BYTES >> 20} MiB are allowed"


def _limit_memory() -> None:
    """Limits the memory allocated from now on: the libraries have reserved much address space that they do not use."""
    status = Path("/proc/self/status")
    if status.exists():
        data = re.search(r"VmData:\s+(\d+) kB", status.read_text())
        if data is not None:
            limit = int(data[1]) * 1024 + MAX_MEMORY
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


if __name__ == "__main__":
    main()
