"""Rate limits of API keys: requests and tokens per minute, answers at once.

The limits are those of one frontend: several do not add up what they count.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from dynserve.errors import RateLimited
from dynserve.frontend.keys import Key


class Bucket:
    """Tokens that come back steadily, a minute's worth at most. May be overdrawn by what was not known before."""

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
        """Seconds until so much is there; more than a minute's worth never is, and waits for a full bucket."""
        return max(0.0, (min(amount, self.capacity) - self.level(now)) * 60 / self.capacity)


class KeyUsage:
    """The requests, tokens and open answers of one key."""

    def __init__(self, key: Key, now: float) -> None:
        self.key = key
        self.requests = Bucket(key.rpm, now) if key.rpm else None
        self.tokens = Bucket(key.tpm, now) if key.tpm else None
        self.open = 0  # answers

    def admit(self, now: float) -> None:
        """Counts one more request. Raises RateLimited when the key has too many, open or within the minute."""
        key = self.key
        if key.concurrency is not None and self.open >= key.concurrency:
            raise _limited(f"key {key.name} has {self.open} answers being made, as many as it may", 1, self, now)
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

    It holds one slot of its key's `concurrency`, and more of them with `acquire_slots`. All tokens that it may come to are
    charged before any of them is computed; `settle` gives back those that were not.
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
        """Requests with the same owner may find each other's prompts in the caches; empty where there are no keys."""
        if self._usage is None:
            return ""
        key = self._usage.key
        return f"group:{key.group}" if key.group else f"key:{key.name}"

    def priority(self, wished: int | None) -> int:
        """A key's priority is a ceiling; without keys everyone may wish."""
        if self._usage is None:
            return wished or 0
        most = self._usage.key.priority or 0
        return most if wished is None else min(wished, most)

    def __enter__(self) -> ChargedCall:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def acquire_slots(self, wanted: int) -> int:
        """How many answers this request may make at once, at most `wanted`: as many as its key has free."""
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
        """Charges what the request may come to, before it is computed. Raises RateLimited."""
        usage, now = self._usage, self._clock()
        if usage is None or usage.tokens is None:
            return
        limit = usage.tokens.capacity
        if tokens > limit:
            message = f"key {usage.key.name}: the request may take {tokens} tokens, and its limit is {limit} a minute"
            error = _limited(f"{message}; ask for shorter or fewer answers, or with a shorter text", 60, usage, now)
            error.headers += (("x-should-retry", "false"),)  # OpenAI's clients would, and it would never be let in
            raise error
        if (wait := usage.tokens.wait(tokens, now)) > 0:
            message = f"key {usage.key.name}: {tokens} tokens are over its limit of {limit} a minute"
            raise _limited(message, wait, usage, now)
        usage.tokens.spend(tokens, now)
        self._charged += tokens

    def settle(self, computed: int) -> None:
        """The request came to `computed` tokens, prompts and answers together: the rest is given back."""
        if self._usage is not None and self._usage.tokens is not None:
            self._usage.tokens.spend(computed - self._charged, self._clock())
        self._charged = 0

    def keep_charge(self) -> None:
        """Keeps the charge although the request failed: that much was computed."""
        self._charged = 0

    def headers(self) -> list[tuple[str, str]]:
        """OpenAI's `x-ratelimit-*`, for keys with limits."""
        return [] if self._usage is None else _headers(self._usage, self._clock())

    def close(self) -> None:
        """Ends the request, and gives back what is still charged."""
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
