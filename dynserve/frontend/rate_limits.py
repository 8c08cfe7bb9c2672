"""Rate limits of API keys: requests and tokens per minute, and concurrent answers.

Each frontend enforces the limits by itself: several frontends do not add up their counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from dynserve.errors import RateLimited
from dynserve.frontend.keys import Key


class Bucket:
    """A token bucket that refills steadily, up to one minute's amount. Amounts that are known late may overdraw it."""

    def __init__(self, per_minute: int, now: float) -> None:
        self.capacity = per_minute
        self._level, self._at = float(per_minute), now

    def level(self, now: float) -> float:
        self._level = min(self.capacity, self._level + (now - self._at) * self.capacity / 60)
        self._at = now
        return self._level

    def spend(self, amount: float, now: float) -> None:
        self._level = self.level(now) - amount

    def wait(self, amount: float, now: float) -> float:
        """Returns the seconds until `amount` is available. An amount over the capacity waits for a full bucket."""
        return max(0.0, (min(amount, self.capacity) - self.level(now)) * 60 / self.capacity)


class KeyUsage:
    """The requests, tokens and open answers of one key."""

    def __init__(self, key: Key, now: float) -> None:
        self.key = key
        self.requests = Bucket(key.rpm, now) if key.rpm else None
        self.tokens = Bucket(key.tpm, now) if key.tpm else None
        self.open = 0  # answers

    def admit(self, now: float) -> None:
        """Counts one more request. Raises RateLimited if the key has too many, open or in this minute."""
        key = self.key
        if key.concurrency is not None and self.open >= key.concurrency:
            raise _limited(
                f"key {key.name} has {self.open} answers in progress, its limit is {key.concurrency}", 1, self, now
            )
        if self.requests is not None:
            if (wait := self.requests.wait(1, now)) > 0:
                raise _limited(f"key {key.name} is over its limit of {key.rpm} requests a minute", wait, self, now)
            self.requests.spend(1, now)


class OpenRequests:
    """The number of HTTP requests between their headers and their last byte."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


class ChargedCall:
    """One API call from its headers to the last byte of its answer, charged to its key. Close it; closing twice is safe.

    It holds one slot of its key's `concurrency`, and more of them after `acquire_slots`. All tokens that it may use are
    charged before any of them is computed; `settle` refunds those that were not computed.
    """

    def __init__(self, open_requests: OpenRequests, usage: KeyUsage | None, clock: Callable[[], float]) -> None:
        self._open_requests, self._usage, self._clock = open_requests, usage, clock
        self._closed = False
        self._charged = 0
        self._slots = 1
        open_requests.count += 1
        if usage is not None:
            usage.open += 1

    @property
    def name(self) -> str:
        return self._usage.key.name if self._usage else ""

    @property
    def cache_owner(self) -> str:
        """The owner of the cached prompts. Requests of one owner reuse each other's; empty without API keys."""
        if self._usage is None:
            return ""
        key = self._usage.key
        return f"group:{key.group}" if key.group else f"key:{key.name}"

    def priority(self, requested: int | None) -> int:
        """Returns the priority of a request. The key's priority is the upper bound; without keys there is none."""
        if self._usage is None:
            return requested or 0
        ceiling = self._usage.key.priority or 0
        return ceiling if requested is None else min(requested, ceiling)

    def __enter__(self) -> ChargedCall:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def acquire_slots(self, wanted: int) -> int:
        """Acquires slots, at most `wanted` and as many as the key has free. Returns the number of concurrent answers."""
        usage = self._usage
        if usage is not None and usage.key.concurrency is not None:
            wanted = min(wanted, self._slots + max(0, usage.key.concurrency - usage.open))
        if wanted > self._slots and usage is not None:
            usage.open += wanted - self._slots
            self._slots = wanted
        return wanted

    @property
    def tokens_per_minute(self) -> int | None:
        usage = self._usage
        return None if usage is None or usage.tokens is None else usage.tokens.capacity

    def charge(self, tokens: int) -> None:
        """Charges the tokens that the request may use, before they are computed. Raises RateLimited."""
        usage, now = self._usage, self._clock()
        if usage is None or usage.tokens is None:
            return
        limit = usage.tokens.capacity
        if tokens > limit:
            message = f"key {usage.key.name}: the request may use {tokens} tokens, and its limit is {limit} a minute"
            error = _limited(f"{message}; request shorter or fewer answers, or shorten the prompt", 60, usage, now)
            error.headers += (("x-should-retry", "false"),)  # OpenAI's clients would, and it would always fail
            raise error
        if (wait := usage.tokens.wait(tokens, now)) > 0:
            message = f"key {usage.key.name}: {tokens} tokens are over its limit of {limit} a minute"
            raise _limited(message, wait, usage, now)
        usage.tokens.spend(tokens, now)
        self._charged += tokens

    def settle(self, computed: int) -> None:
        """Replaces the charge by the `computed` tokens of prompts and answers: the rest is refunded."""
        if self._usage is not None and self._usage.tokens is not None:
            self._usage.tokens.spend(computed - self._charged, self._clock())
        self._charged = 0

    def keep_charge(self) -> None:
        """Keeps the charge of a request that failed, because the work was done."""
        self._charged = 0

    def headers(self) -> list[tuple[str, str]]:
        """OpenAI's `x-ratelimit-*` headers; none for a key without limits."""
        return [] if self._usage is None else _headers(self._usage, self._clock())

    def close(self) -> None:
        """Ends the call, and refunds what is still charged."""
        if not self._closed:
            self._closed = True
            if self._charged:
                self.settle(0)
            self._open_requests.count -= 1
            if self._usage is not None:
                self._usage.open -= self._slots


def _limited(message: str, wait: float, usage: KeyUsage, now: float) -> RateLimited:
    error = RateLimited(message)
    error.retry_after = max(1, math.ceil(wait))
    error.headers = tuple(_headers(usage, now))
    return error


def _headers(usage: KeyUsage, now: float) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for what, bucket in (("requests", usage.requests), ("tokens", usage.tokens)):
        if bucket is not None:
            remaining = bucket.level(now)
            found += [
                (f"x-ratelimit-limit-{what}", str(bucket.capacity)),
                (f"x-ratelimit-remaining-{what}", str(max(0, int(remaining)))),
                (f"x-ratelimit-reset-{what}", f"{(bucket.capacity - remaining) * 60 / bucket.capacity:.3f}s"),
            ]
    return found
