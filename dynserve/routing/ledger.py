"""The load ledger: what every worker has been given and not yet finished.

Three sources, one account per worker:

    own       charges of this frontend: from placement to the last byte, exact
    others    what other frontends say of their own charges (whole sums: the next message replaces a lost one)
    reported  what the worker says of itself: progress on prompts that it has begun, and load that nobody accounts for
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from dynserve.wire.events import Load, Share


@dataclass(slots=True)
class OpenWork:
    """Open work on one worker."""

    prefill_tokens: int = 0  # to be computed; those expected in its cache are not counted
    decode_tokens: int = 0  # prompt and answer so far of requests that are being answered
    requests: int = 0


@dataclass(slots=True)
class Account:
    """One worker's open work, as this frontend knows it. The three sums are read for every candidate of every placement:
    they are kept, not computed."""

    prefill_tokens: int = 0
    decode_tokens: int = 0
    requests: int = 0
    own: OpenWork = field(default_factory=OpenWork)
    others: OpenWork = field(default_factory=OpenWork)
    begun_tokens: int = 0  # reported: computed already, of prompts that are not done
    unseen_tokens: int = 0  # reported: held by requests that no frontend accounts for
    held_tokens: int | None = None  # reported: in blocks that requests hold; a block that several share counts once
    then_tokens: int = 0  # `decode_tokens` at that report
    suspected: bool = False  # the last report had more requests than the books; twice in a row is no coincidence

    @property
    def full_tokens(self) -> int:
        """Tokens of KV cache in use: as reported, and placed since; what requests share is not counted for each of them."""
        if self.held_tokens is None:
            return self.decode_tokens
        return min(self.decode_tokens, self.held_tokens + max(0, self.decode_tokens - self.then_tokens))

    def sum_up(self) -> None:
        own, others = self.own, self.others
        self.prefill_tokens = max(0, own.prefill_tokens + others.prefill_tokens - self.begun_tokens)
        self.decode_tokens = own.decode_tokens + others.decode_tokens + self.unseen_tokens
        self.requests = own.requests + others.requests


class Charge:
    """One request's part in one worker's account. Everything is given back once, in any order, however often called."""

    __slots__ = ("_account", "_changed", "_open", "decode_tokens", "prefill_tokens", "worker")

    def __init__(
        self, worker: str, account: Account, changed: Callable[[str], None], prefill_tokens: int, decode_tokens: int
    ) -> None:
        self.worker, self.prefill_tokens, self.decode_tokens = worker, prefill_tokens, decode_tokens
        self._account, self._changed, self._open = account, changed, True
        account.own.prefill_tokens += prefill_tokens
        account.own.decode_tokens += decode_tokens
        account.own.requests += 1
        account.sum_up()
        changed(worker)

    def prefilled(self) -> None:
        """Its first token is there."""
        if self.prefill_tokens:
            self._account.own.prefill_tokens -= self.prefill_tokens
            self._account.begun_tokens = max(0, self._account.begun_tokens - self.prefill_tokens)
            self.prefill_tokens = 0
            self._account.sum_up()
            self._changed(self.worker)

    def add_tokens(self, tokens: int) -> None:
        """Runs for every burst of tokens; nobody is told."""
        if self._open and self.decode_tokens:
            self.decode_tokens += tokens
            self._account.own.decode_tokens += tokens
            self._account.decode_tokens += tokens

    def close(self) -> None:
        if self._open:
            self._open = False
            self._account.own.prefill_tokens -= self.prefill_tokens
            self._account.own.decode_tokens -= self.decode_tokens
            self._account.own.requests -= 1
            self._account.sum_up()
            self._changed(self.worker)


class Ledger:
    """Accounts by worker id. `listeners` hear of every change of this frontend's own charges."""

    def __init__(self) -> None:
        self.listeners: list[Callable[[str], None]] = []
        self._accounts: dict[str, Account] = {}
        self._shared: dict[str, dict[str, OpenWork]] = {}  # by frontend, by worker

    def account(self, worker: str) -> Account:
        found = self._accounts.get(worker)
        if found is None:
            found = self._accounts[worker] = Account()
            for shares in self._shared.values():
                if worker in shares:
                    _add(found, shares[worker], 1)
        return found

    def charge(self, worker: str, *, prefill_tokens: int = 0, decode_tokens: int = 0) -> Charge:
        return Charge(worker, self.account(worker), self._changed, prefill_tokens, decode_tokens)

    def drop(self, worker: str) -> None:
        """Open charges of the worker keep their own account, so closing them later is safe."""
        self._accounts.pop(worker, None)

    # other frontends

    def shares(self, workers: Iterable[str] | None = None) -> list[Share]:
        """This frontend's own charges, for the others: of these workers, or of all that have any."""
        if workers is None:
            workers = [worker for worker, account in self._accounts.items() if account.own.requests]
        nothing = Account()  # a worker that left: what was placed there is over
        sums = [(worker, self._accounts.get(worker, nothing).own) for worker in workers]
        return [Share(worker, own.prefill_tokens, own.decode_tokens, own.requests) for worker, own in sums]

    def shared(self, frontend: str, shares: Iterable[Share], *, all_of_them: bool) -> None:
        """Another frontend's charges replace what it said before: of the workers it names, or of all."""
        known = self._shared.setdefault(frontend, {})
        if all_of_them:
            self._subtract(known)
            known.clear()
        for share in shares:
            if (before := known.pop(share.worker, None)) is not None:
                self._subtract({share.worker: before})
            if share.requests:
                sums = known[share.worker] = OpenWork(share.prefill_tokens, share.decode_tokens, share.requests)
                if share.worker in self._accounts:
                    _add(self._accounts[share.worker], sums, 1)

    def forget(self, frontend: str) -> None:
        """Another frontend is gone, and its requests with it."""
        self._subtract(self._shared.pop(frontend, {}))

    def _subtract(self, shares: dict[str, OpenWork]) -> None:
        for worker, sums in shares.items():
            if worker in self._accounts:
                _add(self._accounts[worker], sums, -1)

    # workers' own reports

    def reported(self, worker: str, load: Load, block_size: int) -> None:
        """Corrects drift. Only what cannot be a race with a placement on its way is believed: progress on prompts, and
        requests beyond the books in two reports in a row."""
        account = self.account(worker)
        known = account.own.requests + account.others.requests
        account.begun_tokens = min(load.begun_tokens, account.own.prefill_tokens + account.others.prefill_tokens)
        held = (load.total_blocks - load.free_blocks) * block_size
        excess, there = load.running + load.waiting - known, load.running + load.waiting
        # of what is held, the part of those that nobody knows
        account.unseen_tokens = held * excess // there if excess > 0 and account.suspected else 0
        account.suspected = excess > 0
        account.sum_up()
        account.held_tokens, account.then_tokens = held, account.decode_tokens

    def check(self) -> None:
        """Raises AssertionError when something was given back that was never taken."""
        for worker, account in self._accounts.items():
            for sums in (account.own, account.others):
                assert sums.prefill_tokens >= 0, worker
                assert sums.decode_tokens >= 0, worker
                assert sums.requests >= 0, worker

    def _changed(self, worker: str) -> None:
        for listener in self.listeners:
            listener(worker)


def _add(account: Account, sums: OpenWork, sign: int) -> None:
    account.others.prefill_tokens += sign * sums.prefill_tokens
    account.others.decode_tokens += sign * sums.decode_tokens
    account.others.requests += sign * sums.requests
    account.sum_up()
