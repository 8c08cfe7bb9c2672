from __future__ import annotations

import random

from dynserve.routing.ledger import Charge, Ledger
from dynserve.wire.events import Load, Share


def sums(ledger: Ledger, worker: str = "w") -> tuple[int, int, int]:
    account = ledger.account(worker)
    return account.prefill_tokens, account.decode_tokens, account.requests


def test_closing_a_charge_after_its_worker_departed_is_safe() -> None:
    ledger = Ledger()
    charge = ledger.charge("w", prefill_tokens=5, decode_tokens=1)
    ledger.drop("w")
    charge.close()
    assert sums(ledger) == (0, 0, 0)


def test_a_charge_grows_with_the_answer_and_is_removed_entirely() -> None:
    ledger = Ledger()
    charge = ledger.charge("w", prefill_tokens=100, decode_tokens=100)
    charge.prefilled()
    charge.add_tokens(7)
    assert sums(ledger) == (0, 107, 1)
    charge.close()
    charge.add_tokens(7)
    assert sums(ledger) == (0, 0, 0)


def test_a_prefill_charge_does_not_grow() -> None:
    ledger = Ledger()
    ledger.charge("w", prefill_tokens=100).add_tokens(1)
    assert sums(ledger) == (100, 0, 1)


def test_no_charge_survives_its_request_in_any_order_of_events() -> None:
    r = random.Random(3)
    ledger, open_ = Ledger(), list[Charge]()
    for _ in range(5_000):
        kind = r.random()
        if kind < 0.3:
            open_.append(
                ledger.charge(r.choice("abc"), prefill_tokens=r.randrange(100), decode_tokens=r.randrange(100))
            )
        elif open_:
            charge = r.choice(open_)
            if kind < 0.5:
                charge.prefilled()
            elif kind < 0.7:
                charge.add_tokens(r.randrange(10))
            else:
                charge.close()
                open_.remove(charge)
        if r.random() < 0.01:
            ledger.drop(r.choice("abc"))
        ledger.check()
    for charge in open_:
        charge.close()
    assert [sums(ledger, w) for w in "abc"] == [(0, 0, 0)] * 3


def test_shares_of_other_frontends_replace_their_earlier_shares() -> None:
    ledger = Ledger()
    ledger.charge("w", prefill_tokens=10)
    for _ in range(3):  # as if two of three messages had come twice
        ledger.shared("other", [Share("w", 100, 50, 2)], all_of_them=False)
    assert sums(ledger) == (110, 50, 3)
    ledger.shared("other", [Share("v", 1, 1, 1)], all_of_them=False)
    assert sums(ledger) == (110, 50, 3)
    ledger.shared("other", [Share("v", 1, 1, 1)], all_of_them=True)
    assert sums(ledger) == (10, 0, 1)
    ledger.forget("other")
    assert sums(ledger, "v") == (0, 0, 0)


def test_shares_of_other_frontends_on_a_worker_that_joins_later_are_kept() -> None:
    ledger = Ledger()
    ledger.shared("other", [Share("w", 100, 0, 1)], all_of_them=True)
    ledger.drop("w")
    assert sums(ledger) == (100, 0, 1)


def test_a_frontend_shares_only_its_own_charges() -> None:
    ledger = Ledger()
    ledger.charge("w", prefill_tokens=10, decode_tokens=3)
    ledger.charge("v", prefill_tokens=5).close()
    ledger.shared("other", [Share("w", 100, 0, 1)], all_of_them=True)
    assert ledger.shares() == [Share("w", 10, 3, 1)]
    assert ledger.shares(["v"]) == [Share("v", 0, 0, 0)]  # a change to zero is reported, too


def test_prefill_progress_that_a_worker_reports_is_subtracted_once() -> None:
    ledger = Ledger()
    first, second = ledger.charge("w", prefill_tokens=1000), ledger.charge("w", prefill_tokens=500)
    ledger.reported("w", Load(running=2, begun_tokens=800), 32)
    assert sums(ledger)[0] == 700
    first.prefilled()
    assert sums(ledger)[0] == 500
    second.prefilled()
    assert sums(ledger)[0] == 0
    ledger.check()


def test_unaccounted_load_counts_from_the_second_report_on() -> None:
    ledger = Ledger()
    load = Load(running=3, free_blocks=60, total_blocks=100)
    ledger.reported("w", load, 32)
    assert sums(ledger) == (0, 0, 0)  # it may be a request whose end is on its way
    ledger.reported("w", load, 32)
    assert sums(ledger) == (0, 40 * 32, 0)
    ledger.reported("w", Load(free_blocks=100, total_blocks=100), 32)
    assert sums(ledger) == (0, 0, 0)


def test_shares_of_a_departed_worker_do_not_recreate_its_account() -> None:
    ledger = Ledger()
    charge = ledger.charge("w", prefill_tokens=10)
    ledger.drop("w")
    charge.close()
    assert ledger.shares(["w"]) == [Share("w", 0, 0, 0)]
    ledger.shared("other", [Share("w", 0, 0, 0), Share("v", 5, 0, 1)], all_of_them=False)
    ledger.shared("other", [Share("v", 0, 0, 0)], all_of_them=False)
    assert not ledger._accounts and not ledger._shared["other"]


def test_only_the_part_of_unaccounted_requests_is_added_to_the_load() -> None:
    ledger = Ledger()
    for _ in range(3):
        ledger.charge("w", prefill_tokens=300)
    load = Load(running=4, free_blocks=60, total_blocks=100)
    ledger.reported("w", load, 32)
    ledger.reported("w", load, 32)
    assert sums(ledger) == (900, 40 * 32 // 4, 3)
