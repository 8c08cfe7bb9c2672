"""Roles: the workers that answer the requests of a model, and those that stand in for a role without workers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from dynserve.routing.router import RoutingTarget

PAIR = ("prefill", "decode")


class Lineup(NamedTuple):
    """The workers that answer requests of a model now: pairs of `prefill` and `decode` workers, or else workers that each
    answer `alone`, which have the role `alone_role`. All are empty if nobody answers."""

    prefill: Sequence[RoutingTarget] = ()
    decode: Sequence[RoutingTarget] = ()
    alone: Sequence[RoutingTarget] = ()
    alone_role: str = ""

    @property
    def generating(self) -> Sequence[RoutingTarget]:
        """The workers that generate answers, after a prefill here or elsewhere."""
        return self.alone or self.decode

    @property
    def anyone(self) -> bool:
        """True if requests of the model are answered at all."""
        return bool(self.alone or self.prefill)


class RoleWatch:
    """Notes since when a model lacks one of the two roles of a pair. `on_overdue` is called when a role has been missing
    for `grace_s` seconds: from then on workers of the other role may stand in."""

    def __init__(self, grace_s: float, on_overdue: Callable[[], None]) -> None:
        self._grace_s, self._on_overdue = grace_s, on_overdue
        self._loop = asyncio.get_running_loop()
        self._paired: set[str] = set()  # models that have had workers of a pair
        self._missing: dict[tuple[str, str], float] = {}  # since when

    def update(self, present: Mapping[str, set[str]]) -> None:
        """Notes the roles that have usable workers now, by model."""
        self._paired.update(model for model, roles in present.items() if not roles.isdisjoint(PAIR))
        for model in self._paired:
            for role in PAIR:
                if role in present.get(model, ()):
                    self._missing.pop((model, role), None)
                elif (model, role) not in self._missing:
                    self._missing[model, role] = self._loop.time()
                    self._loop.call_later(self._grace_s, self._on_overdue)

    def forget(self, model: str) -> None:
        """Removes a model that is not served any more."""
        self._paired.discard(model)
        for role in PAIR:
            self._missing.pop((model, role), None)

    def overdue(self, model: str, role: str) -> bool:
        """Returns True if the role has been missing for longer than the grace time."""
        since = self._missing.get((model, role))
        return since is not None and self._loop.time() >= since + self._grace_s

    def overdue_roles(self) -> dict[tuple[str, str], float]:
        """Returns how long roles have been missing, in seconds, by model and role."""
        now = self._loop.time()
        return {key: now - since for key, since in self._missing.items() if self.overdue(*key)}
