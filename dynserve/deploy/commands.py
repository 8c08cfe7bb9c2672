"""Finds Dynamo's commands in a container's command line, which may be a shell script.

The script is read only to tell role, model and namespace; it runs as the user wrote it.
"""

from __future__ import annotations

import io
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from dynserve.errors import ConfigError

_PYTHON = re.compile(r"(.*/)?python(\d+(\.\d+)*)?")
_SHELL = re.compile(r"(.*/)?(ba|da|z|k)?sh")
_SEPARATORS = set(";&|\n()")
_VARIABLE = re.compile(r"\$(?:\{(\w+)(?::?-([^}]*))?\}|(\w+))")


OWN = {"dynserve.frontend": "frontend", "dynserve.worker": "worker"}  # our own modules -> roles


# The guide's edit of an installed file of Triton, which fails on non-ASCII paths: comment, assignment, and the whole `if`
_TRITON_PATCH = re.compile(
    r"^(?:[ \t]*#[^\n]*\n)?[ \t]*\w+=[^\n]*triton/backends/nvidia/driver\.py[^\n]*\n"
    r"[ \t]*if [^\n]*\n(?:[^\n]*\n)*?[ \t]*fi[ \t]*\n(?:[ \t]*\n)*",
    re.MULTILINE,
)


def without_triton_patch(script: str) -> str:
    """Returns a shell script without the deployment guide's patch of Triton. Workers of dynserve need none: Triton does not
    run the code that it changes (`executors/trtllm/environment.py`)."""
    return _TRITON_PATCH.sub("", script)


class Command(NamedTuple):
    """One call of a module of Dynamo, `python3 -m dynamo.MODULE ARGUMENTS`, or of dynserve's own, whose name is whole."""

    module: str
    arguments: list[str]


def find_command(words: Sequence[str], env: Mapping[str, str]) -> Command | None:
    """Returns Dynamo's command among the words of a container's command and args; None if there is none.

    `env` has the values for `$NAME`. A command that the script runs twice counts once.

    Raises:
        ConfigError: there are two different ones, or the script's quotes are not closed.
    """
    found = [command for part in _simple_commands(words, env) if (command := _dynamo(part)) is not None]
    if any(command != found[0] for command in found):
        modules = " and ".join(
            command.module if command.module in OWN else f"dynamo.{command.module}" for command in found[:2]
        )
        raise ConfigError(f"the command runs {modules}; one container serves one of them")
    return found[0] if found else None


def _simple_commands(words: Sequence[str], env: Mapping[str, str]) -> Iterator[list[str]]:
    script = _script(words)
    if script is None:
        yield [_expand(word, env, in_shell=False) for word in words]
        return
    part: list[str] = []
    for word in _words(script):
        if set(word) & _SEPARATORS and set(word) <= _SEPARATORS | {"<", ">"} and ">" not in word and "<" not in word:
            yield part
            part = []
        elif word and set(word) <= set("<>&"):  # a redirection: the number before it is not an argument
            if part and part[-1].isdecimal():
                part.pop()
            yield part
            part = []
        else:
            part.append(_expand(word, env, in_shell=True))
    yield part


def _script(words: Sequence[str]) -> str | None:
    """Returns the text of `sh -c TEXT`; None if this is no such command."""
    if not words or not _SHELL.fullmatch(words[0]):
        return None
    for number, word in enumerate(words[1:], 1):
        if not word.startswith("-"):
            return None
        if not word.startswith("--") and "c" in word:
            return words[number + 1] if number + 1 < len(words) else ""
    return None


class _Script(io.StringIO):
    """A comment ends before its line break, which separates commands."""

    def readline(self, size: int = -1, /) -> str:  # type: ignore[override]  # which the type stubs give as bytes
        at = self.tell()
        line = super().readline(size)
        if line.endswith("\n"):
            self.seek(at + len(line) - 1)
        return line


def _words(script: str) -> Iterator[str]:
    lexer = shlex.shlex(_Script(script.replace("\\\n", " ")), posix=True, punctuation_chars=";&|<>()\n")
    lexer.whitespace, lexer.whitespace_split = " \t\r", True
    try:
        yield from lexer
    except ValueError as error:
        raise ConfigError(f"the shell command has an error: {str(error).lower()}") from error


def _dynamo(words: Sequence[str]) -> Command | None:
    for at in range(len(words) - 2):
        if not _PYTHON.fullmatch(words[at]) or words[at + 1] != "-m":
            continue
        if words[at + 2].startswith("dynamo."):
            return Command(words[at + 2].removeprefix("dynamo."), list(words[at + 3 :]))
        if words[at + 2] == "dynserve" and f"dynserve.{words[at + 3] if at + 3 < len(words) else ''}" in OWN:
            return Command(f"dynserve.{words[at + 3]}", list(words[at + 4 :]))
        if words[at + 2] in OWN:
            return Command(words[at + 2], list(words[at + 3 :]))
    return None


def _expand(word: str, env: Mapping[str, str], *, in_shell: bool) -> str:
    """Replaces variables: `$NAME` and `${NAME:-default}` as a shell does, `$(NAME)` as Kubernetes does."""
    if not in_shell:
        return re.sub(r"\$\((\w+)\)", lambda match: env.get(match[1], match[0]), word)
    return _VARIABLE.sub(lambda match: env.get(match[1] or match[3]) or match[2] or "", word)
