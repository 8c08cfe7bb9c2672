"""One request in the engine: the part of it that is computed there, and how far it has come."""

from __future__ import annotations

import asyncio
from enum import Enum, auto
from typing import Any

from dynserve.executors.base import OutputSink
from dynserve.executors.trtllm.answer import Cursor
from dynserve.wire.requests import GenerateRequest


class Kind(Enum):
    """The part of a request that the engine computes."""

    CONTEXT = auto()  # the prompt and one token, then a hand-off
    GENERATION = auto()  # the tokens after a hand-off
    WHOLE = auto()  # prompt and answer


class Progress(Enum):
    """The state of a request in the engine.

        SUBMITTED ──first response──▶ ANSWERING ──abort──▶ ABORTED
            ├──abort of a GENERATION request──▶ ABANDONED ──first response──▶ ABORTED
            └──abort of any other request──▶ ABORTED

    To abort a GENERATION request before its first response can crash the engine. A request that is not aborted stays
    ANSWERING until its last response.
    """

    SUBMITTED = auto()
    ANSWERING = auto()
    ABANDONED = auto()
    ABORTED = auto()


class EngineRequest:
    """One request in the engine. `sink` is None once no more output is wanted."""

    __slots__ = (
        "answered", "apart", "began", "charged", "cursor", "generated", "handed_over", "handoff_id", "kind", "known",
        "progress", "request", "result", "sink", "task", "timer",
    )  # fmt: skip

    def __init__(self, request: GenerateRequest, kind: Kind, sink: OutputSink, began: float) -> None:
        self.request, self.kind, self.began = request, kind, began
        self.sink: OutputSink | None = sink
        self.progress = Progress.SUBMITTED
        # tokens that the client had before
        self.known = len(request.prior_tokens)
        self.generated = self.known  # tokens that the client has now
        self.handoff_id = 0  # id of the hand-off that a context phase opens
        self.handed_over = False  # a hand-off was opened for its blocks
        self.charged = 0  # tokens that count as its load
        self.answered = False  # a first response has come
        self.apart: tuple[int, bool] | None = None  # what ends `TrtllmEngine.note_apart`
        self.result: Any = None
        self.cursor: Cursor
        self.task: asyncio.Task[None]
        self.timer: asyncio.TimerHandle | None = None

    @property
    def declines_handoff(self) -> bool:
        """Whether the prompt is computed here although a prefill worker has computed it."""
        return self.request.phase == "decode" and self.kind is Kind.WHOLE

    @property
    def has_output(self) -> bool:
        """Whether this worker has sent the client any token."""
        return self.generated > self.known

    @property
    def can_abort(self) -> bool:
        return self.kind is not Kind.GENERATION or self.progress in (Progress.ANSWERING, Progress.ABORTED)

    def stop_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
