"""Reasoning between `<think>` and `</think>`, as DeepSeek-R1, Qwen3 and similar models write it."""

from __future__ import annotations

from enum import Enum, auto

from dynserve.dialects.base import Content, Piece, ReasoningText, held_back

BEGIN, END = "<think>", "</think>"

# parser -> whether reasoning is open when the prompt ends with neither tag
NAMES = {"qwen3": False, "deepseek_r1": True}


def is_open(parser: str, prompt: str, *, continued: bool = False) -> bool:
    """Whether an answer to this prompt (rendered text) begins within reasoning. `continued`: the prompt holds the beginning
    of the answer, in which reasoning may have begun and ended."""
    if continued:
        return prompt.rfind(BEGIN) > prompt.rfind(END)
    end = prompt.rstrip()
    return end.endswith(BEGIN) or (NAMES[parser] and not end.endswith(END))


class _ReasoningState(Enum):
    START = auto()  # not decided yet whether the answer begins with reasoning
    REASONING = auto()
    BETWEEN = auto()  # after the reasoning, before the first character of the answer
    ANSWER = auto()


class ThinkTags:
    """Splits at most one section of reasoning from the answer. White space around the reasoning is dropped."""

    def __init__(self, *, open: bool) -> None:
        self._open, self._state = open, _ReasoningState.START
        self._held = ""
        self._emitted = False  # some reasoning was emitted

    def push(self, text: str) -> list[Piece]:
        if self._state is _ReasoningState.ANSWER:
            return [Content(text)] if text else []
        self._held += text
        pieces: list[Piece] = []
        if self._state is _ReasoningState.START:
            self._start()
        if self._state is _ReasoningState.REASONING:
            pieces += self._reason()
        if self._state is _ReasoningState.BETWEEN and (answer := self._held.lstrip()):
            self._state, self._held = _ReasoningState.ANSWER, answer
        if self._state is _ReasoningState.ANSWER and self._held:
            pieces.append(Content(self._release(len(self._held))))
        return pieces

    @property
    def in_reasoning(self) -> bool:
        """Whether the next token counts as reasoning rather than as the answer."""
        return self._state in (_ReasoningState.START, _ReasoningState.REASONING)

    def finish(self) -> list[Piece]:
        """Returns the held text. Reasoning without an end tag stays reasoning; an incomplete tag is content."""
        held = self._release(len(self._held))
        if self._state is _ReasoningState.REASONING or (self._state is _ReasoningState.START and self._open):
            held = held.rstrip() if self._emitted else held.strip()
            return [ReasoningText(held)] if held else []
        return [Content(held)] if held and self._state is not _ReasoningState.BETWEEN else []

    def _start(self) -> None:
        begin = self._held.lstrip()
        if begin.startswith(BEGIN):
            self._state, self._held = _ReasoningState.REASONING, begin[len(BEGIN) :]
        elif not BEGIN.startswith(begin):
            self._state = _ReasoningState.REASONING if self._open else _ReasoningState.ANSWER

    def _reason(self) -> list[Piece]:
        reasoning, tag, rest = self._held.partition(END)
        if tag:
            self._state, self._held = _ReasoningState.BETWEEN, rest
        else:
            reasoning = reasoning[: len(reasoning) - held_back(reasoning, (END,))]
        text = reasoning.rstrip()
        if not tag:
            self._release(len(text))
        if not self._emitted:
            text = text.lstrip()
        self._emitted = self._emitted or bool(text)
        return [ReasoningText(text)] if text else []

    def _release(self, count: int) -> str:
        released, self._held = self._held[:count], self._held[count:]
        return released
