"""The load ledger: the work that was placed on every worker and is not finished.

Each worker has one account, with three sources:

    own       this frontend's charges, exact, from placement to the last byte
    others    sums that other frontends publish of their charges (whole sums: the next message replaces a lost one)
    reported  load that the worker reports: progress on prompts that it has begun, and requests of no known frontend
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from dynserve.wire.events import Load, Share


@dataclass(slots=True)
class OpenWork:
    """Open work on one worker."""

    prefill_tokens: int = 0  # to be computed, without those expected in the worker's cache
    decode_tokens: int = 0  # prompt and answer so far of requests that are being answered
    requests: int = 0


@dataclass(slots=True)
class Account:
    """The open work of one worker. The three sums are read for every candidate of every placement, so they are stored, not
    computed."""

    prefill_tokens: int = 0
    decode_tokens: int = 0
    requests: int = 0
    own: OpenWork = field(default_factory=OpenWork)
    others: OpenWork = field(default_factory=OpenWork)
    begun_tokens: int = 0  # reported: computed tokens of prompts that are not complete
    unseen_tokens: int = 0  # reported: held by requests that no frontend accounts for
    held_tokens: int | None = None  # reported: in blocks that requests hold; a shared block counts once
    then_tokens: int = 0  # `decode_tokens` at that report
    suspected: bool = False  # the last report had more requests than the ledger; a second one in a row is trusted

    @property
    def full_tokens(self) -> int:
        """Tokens of KV cache in use: those of the last report, and those placed since. Shared blocks count once."""
        if self.held_tokens is None:
            return self.decode_tokens
        return min(self.decode_tokens, self.held_tokens + max(0, self.decode_tokens - self.then_tokens))

    def sum_up(self) -> None:
        own, others = self.own, self.others
        self.prefill_tokens = max(0, own.prefill_tokens + others.prefill_tokens - self.begun_tokens)
        self.decode_tokens = own.decode_tokens + others.decode_tokens + self.unseen_tokens
        self.requests = own.requests + others.requests


class Charge:
    """One request's share of one worker's account. `prefilled` and `close` may be called in any order, and repeatedly."""

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
        """Removes the prefill tokens, because the first token has arrived."""
        if self.prefill_tokens:
            self._account.own.prefill_tokens -= self.prefill_tokens
            self._account.begun_tokens = max(0, self._account.begun_tokens - self.prefill_tokens)
            self.prefill_tokens = 0
            self._account.sum_up()
            self._changed(self.worker)

    def add_tokens(self, tokens: int) -> None:
        """Adds tokens of the answer. Runs for every burst, and calls no listener."""
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
    """Accounts by worker id. `listeners` get the worker's id after every change of this frontend's own charges."""

    def __init__(self) -> None:
        self.listeners: list[Callable[[str], None]] = []
        self._accounts: dict[str, Account] = {}
        self._shared: dict[str, dict[str, OpenWork]] = {}  # by frontend, then by worker

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
        """Removes a worker's account. Open charges keep a reference to it, so closing them later is safe."""
        self._accounts.pop(worker, None)

    # other frontends

    def shares(self, workers: Iterable[str] | None = None) -> list[Share]:
        """Returns this frontend's sums to publish: of these workers, or of all that have open requests here."""
        if workers is None:
            workers = [worker for worker, account in self._accounts.items() if account.own.requests]
        nothing = Account()  # of a departed worker, whose requests have ended
        sums = [(worker, self._accounts.get(worker, nothing).own) for worker in workers]
        return [Share(worker, own.prefill_tokens, own.decode_tokens, own.requests) for worker, own in sums]

    def shared(self, frontend: str, shares: Iterable[Share], *, all_of_them: bool) -> None:
        """Replaces another frontend's earlier sums: of the workers in `shares`, or of all workers."""
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
        """Removes the charges of another frontend, which has ended with its requests."""
        self._subtract(self._shared.pop(frontend, {}))

    def _subtract(self, shares: dict[str, OpenWork]) -> None:
        for worker, sums in shares.items():
            if worker in self._accounts:
                _add(self._accounts[worker], sums, -1)

    # workers' own reports

    def reported(self, worker: str, load: Load, block_size: int) -> None:
        """Corrects drift by a worker's load report. Only values are used that no race with a placement in flight explains:
        progress on prompts, and requests missing in the ledger in two reports in a row."""
        account = self.account(worker)
        known = account.own.requests + account.others.requests
        account.begun_tokens = min(load.begun_tokens, account.own.prefill_tokens + account.others.prefill_tokens)
        held = (load.total_blocks - load.free_blocks) * block_size
        excess, present = load.running + load.waiting - known, load.running + load.waiting
        # the part of the held tokens that belongs to unknown requests
        account.unseen_tokens = held * excess // present if excess > 0 and account.suspected else 0
        account.suspected = excess > 0
        account.sum_up()
        account.held_tokens, account.then_tokens = held, account.decode_tokens

    def forget_report(self, worker: str) -> None:
        """Removes what a worker has reported: its reports have stopped, and the charges are all that is known."""
        account = self.account(worker)
        account.begun_tokens = account.unseen_tokens = 0
        account.held_tokens, account.suspected = None, False
        account.sum_up()

    def check(self) -> None:
        """Raises AssertionError if more was subtracted than was charged."""
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
