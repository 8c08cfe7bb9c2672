"""The load ledger: what every worker has been given and not yet finished, by this frontend's own books."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Account:
    """One worker's open work."""

    prefill_tokens: int = 0  # placed and not yet prefilled
    decode_blocks: int = 0  # held by requests that are being answered
    requests: int = 0


@dataclass(slots=True)
class Charge:
    """One request's part in one worker's account. Both give-backs happen once, in any order, however often called."""

    account: Account
    prefill_tokens: int
    decode_blocks: int
    open: bool = True

    def prefilled(self) -> None:
        self.account.prefill_tokens -= self.prefill_tokens
        self.prefill_tokens = 0

    def close(self) -> None:
        self.prefilled()
        if self.open:
            self.open = False
            self.account.decode_blocks -= self.decode_blocks
            self.account.requests -= 1


class Ledger:
    """Accounts by worker id."""

    def __init__(self) -> None:
        self._accounts: dict[str, Account] = {}

    def account(self, worker: str) -> Account:
        found = self._accounts.get(worker)
        if found is None:
            found = self._accounts[worker] = Account()
        return found

    def charge(self, worker: str, *, prefill_tokens: int = 0, decode_blocks: int = 0) -> Charge:
        account = self.account(worker)
        account.prefill_tokens += prefill_tokens
        account.decode_blocks += decode_blocks
        account.requests += 1
        return Charge(account, prefill_tokens, decode_blocks)

    def drop(self, worker: str) -> None:
        """Open charges of the worker keep their own account, so closing them later is safe."""
        self._accounts.pop(worker, None)

    def check(self) -> None:
        """Raises AssertionError when something was given back that was never taken."""
        for worker, account in self._accounts.items():
            assert account.prefill_tokens >= 0, worker
            assert account.decode_blocks >= 0, worker
            assert account.requests >= 0, worker
