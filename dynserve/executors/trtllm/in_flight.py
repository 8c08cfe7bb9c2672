"""The requests of one rank in the engine, and the tokens that they hold, by our own count.

An engine tells this in its statistics, which are off by default. A finished prefill holds its blocks until they are
fetched, or until the engine's own time limit: it cannot be aborted.
"""

from __future__ import annotations

import asyncio

from dynserve.executors.trtllm.engine_request import EngineRequest, Kind
from dynserve.executors.trtllm.stats import OpenRequests


class InFlight:
    """`transfer_s`: how long the engine keeps blocks that nobody fetches; None: for ever."""

    def __init__(self, transfer_s: float | None) -> None:
        self._loop, self._transfer_s = asyncio.get_running_loop(), transfer_s
        self._live = self._tokens = self._unanswered = self._unanswered_tokens = self._held_tokens = 0
        # finished prefills with an open hand-off, by ticket: the tokens of the prompt, and when they were finished
        self._contexts: dict[int, tuple[int, float]] = {}
        self._releases: set[asyncio.TimerHandle] = set()  # of those that nobody will fetch

    @property
    def live(self) -> int:
        """The number of requests in the engine, whether their outputs are still wanted or not."""
        return self._live

    @property
    def counts(self) -> OpenRequests:
        return OpenRequests(self._live, self._tokens, self._unanswered, self._unanswered_tokens, self._held_tokens)

    def started(self, call: EngineRequest) -> None:
        self._live += 1
        if call.kind is Kind.GENERATION:  # computes no prompt, and waits for its transfer only
            call.answered = True
        else:
            self._unanswered += 1
            self._unanswered_tokens += call.request.num_tokens
        self.grew(call, call.request.num_tokens + call.known)

    def answered(self, call: EngineRequest) -> None:
        """Notes the first response. Cached tokens of the prompt hold no blocks of their own."""
        self._no_longer_unanswered(call)
        if call.kind is not Kind.GENERATION:  # there, blocks that were transferred count as cached
            self.grew(call, -min(call.request.num_tokens, call.result.cached_tokens or 0))

    def grew(self, call: EngineRequest, tokens: int) -> None:
        call.charged += tokens
        self._tokens += tokens

    def ended(self, call: EngineRequest) -> None:
        self._live -= 1
        self._tokens -= call.charged
        self._no_longer_unanswered(call)

    def hold(self, ticket: int, tokens: int) -> None:
        """Notes a finished prefill whose blocks wait to be fetched."""
        self._contexts[ticket] = (tokens, self._loop.time())
        self._held_tokens += tokens

    def release(self, ticket: int, *, fetched: bool) -> None:
        """Ends `hold`: now, or for blocks that nobody fetched at the engine's time limit."""
        tokens, finished = self._contexts.pop(ticket)
        if fetched:
            self._held_tokens -= tokens
        elif self._transfer_s is not None:

            def freed() -> None:
                self._releases.discard(timer)
                self._held_tokens -= tokens

            timer = self._loop.call_at(finished + self._transfer_s, freed)
            self._releases.add(timer)

    def close(self) -> None:
        for timer in self._releases:
            timer.cancel()
        self._releases.clear()

    def _no_longer_unanswered(self, call: EngineRequest) -> None:
        if not call.answered:
            call.answered = True
            self._unanswered -= 1
            self._unanswered_tokens -= call.request.num_tokens
