from __future__ import annotations

import json
import math

import numpy as np

from dynserve.frontend.decisions import IN_HEADER, MAX_CANDIDATES, Decision, Predictions
from dynserve.routing.ledger import Ledger
from dynserve.routing.policy import Candidate
from dynserve.routing.router import PlacementReason, Reservation, Router


def placed(worker: str, costs: list[float]) -> Reservation:
    candidates = [Candidate(f"w{i}", i, 0.0, 0.0, 0) for i in range(200)]
    reason = PlacementReason("prefill", "Kv", candidates, costs, 10)
    return Reservation(Ledger().charge(worker), 32, reason, Router().pending, ())


def test_of_many_candidates_the_cheapest_are_kept_and_the_rest_counted() -> None:
    decision = Decision("r", "m", 320, 0.0)
    decision.placed(placed("w199", [float(200 - i) for i in range(200)]))
    (placement,) = decision.as_dict()["placements"]
    assert len(placement["candidates"]) == MAX_CANDIDATES and placement["candidates_omitted"] == 200 - MAX_CANDIDATES
    assert placement["candidates"][0] == placement["candidates"][0] | {
        "worker": "w199",
        "cost": 1.0,
        "overlap_blocks": 199,
    }
    assert (placement["runner_up"], placement["margin"]) == ("w198", 1.0)
    header = json.loads(decision.header())["placements"][0]
    assert len(header["candidates"]) == IN_HEADER and len(decision.header()) < 4000


def test_excluded_candidates_have_no_cost_in_the_record() -> None:
    decision = Decision("r", "m", 320, 0.0)
    decision.placed(placed("w0", [1.0] + [math.inf] * 199))
    (placement,) = decision.as_dict()["placements"]
    assert [c["cost"] for c in placement["candidates"][:2]] == [1.0, None]
    assert placement["margin"] is None
    json.dumps(decision.as_dict(), allow_nan=False)


def test_placements_of_policies_without_costs_are_recorded() -> None:
    decision = Decision("r", "m", 320, 0.0)
    decision.placed(placed("w0", []))
    (placement,) = decision.as_dict()["placements"]
    assert placement["runner_up"] is None and placement["candidates"][0]["cost"] is None


def test_drift_needs_large_errors_and_ends_when_predictions_are_right_again() -> None:
    predictions = Predictions()
    for _ in range(20):
        predictions.note("w", 96, 90)
    assert not predictions.drifting("w")
    for _ in range(20):
        predictions.note("w", 960, 0)
    assert predictions.drifting("w") and predictions.ratios()["w"] > 2
    for _ in range(300):
        predictions.note("w", 960, 960)
    assert not predictions.drifting("w")
    predictions.forget("w")
    assert predictions.ratios() == {}


def test_costs_of_a_wrong_length_or_type_do_not_break_the_record() -> None:
    decision = Decision("r", "m", 320, 0.0)
    decision.placed(placed("w0", [1.0, 2.0]))
    decision.placed(placed("w0", [np.float64(i) for i in range(200)]))
    short, foreign = decision.as_dict()["placements"]
    assert short["candidates"][0]["cost"] is None
    assert foreign["candidates"][1]["cost"] == 1.0 and foreign["margin"] == 1.0
    json.dumps(decision.as_dict(), allow_nan=False)
