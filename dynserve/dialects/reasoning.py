"""Thoughts between `<think>` and `</think>`, as DeepSeek-R1, Qwen3 and their kin write them."""

from __future__ import annotations

from enum import Enum, auto

from dynserve.dialects.base import Content, Piece, ReasoningText, held_back

BEGIN, END = "<think>", "</think>"

# parser -> whether a thought is open where the prompt does not say
NAMES = {"qwen3": False, "deepseek_r1": True}


def is_open(parser: str, prompt: str, *, continued: bool = False) -> bool:
    """Whether an answer to this prompt (rendered text) begins within a thought. `continued`: the prompt holds the beginning
    of the answer, in which a thought may have begun and ended."""
    if continued:
        return prompt.rfind(BEGIN) > prompt.rfind(END)
    end = prompt.rstrip()
    return end.endswith(BEGIN) or (NAMES[parser] and not end.endswith(END))


class _ReasoningState(Enum):
    START = auto()  # is there a thought?
    THOUGHT = auto()
    BETWEEN = auto()  # behind a thought, before the first word of the answer
    ANSWER = auto()


class ThinkTags:
    """At most one thought, then the answer. White space around a thought belongs to neither."""

    def __init__(self, *, open: bool) -> None:
        self._open, self._state = open, _ReasoningState.START
        self._held = ""
        self._said = False  # something of the thought

    def push(self, text: str) -> list[Piece]:
        if self._state is _ReasoningState.ANSWER:
            return [Content(text)] if text else []
        self._held += text
        pieces: list[Piece] = []
        if self._state is _ReasoningState.START:
            self._start()
        if self._state is _ReasoningState.THOUGHT:
            pieces += self._reason()
        if self._state is _ReasoningState.BETWEEN and (answer := self._held.lstrip()):
            self._state, self._held = _ReasoningState.ANSWER, answer
        if self._state is _ReasoningState.ANSWER and self._held:
            pieces.append(Content(self._release(len(self._held))))
        return pieces

    @property
    def in_reasoning(self) -> bool:
        """The next token is not one of the answer yet."""
        return self._state in (_ReasoningState.START, _ReasoningState.THOUGHT)

    def finish(self) -> list[Piece]:
        """A thought without an end is a thought; a tag that never was complete is text."""
        held = self._release(len(self._held))
        if self._state is _ReasoningState.THOUGHT or (self._state is _ReasoningState.START and self._open):
            held = held.rstrip() if self._said else held.strip()
            return [ReasoningText(held)] if held else []
        return [Content(held)] if held and self._state is not _ReasoningState.BETWEEN else []

    def _start(self) -> None:
        begin = self._held.lstrip()
        if begin.startswith(BEGIN):
            self._state, self._held = _ReasoningState.THOUGHT, begin[len(BEGIN) :]
        elif not BEGIN.startswith(begin):
            self._state = _ReasoningState.THOUGHT if self._open else _ReasoningState.ANSWER

    def _reason(self) -> list[Piece]:
        thought, tag, rest = self._held.partition(END)
        if tag:
            self._state, self._held = _ReasoningState.BETWEEN, rest
        else:
            thought = thought[: len(thought) - held_back(thought, (END,))]
        said = thought.rstrip()
        if not tag:
            self._release(len(said))
        if not self._said:
            said = said.lstrip()
        self._said = self._said or bool(said)
        return [ReasoningText(said)] if said else []

    def _release(self, count: int) -> str:
        taken, self._held = self._held[:count], self._held[count:]
        return taken
