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
    (told,) = decision.as_dict()["placements"]
    assert len(told["candidates"]) == MAX_CANDIDATES and told["candidates_omitted"] == 200 - MAX_CANDIDATES
    assert told["candidates"][0] == told["candidates"][0] | {"worker": "w199", "cost": 1.0, "overlap_blocks": 199}
    assert (told["runner_up"], told["margin"]) == ("w198", 1.0)
    header = json.loads(decision.header())["placements"][0]
    assert len(header["candidates"]) == IN_HEADER and len(decision.header()) < 4000


def test_candidates_that_were_left_out_have_no_cost_in_the_record() -> None:
    decision = Decision("r", "m", 320, 0.0)
    decision.placed(placed("w0", [1.0] + [math.inf] * 199))
    (told,) = decision.as_dict()["placements"]
    assert [c["cost"] for c in told["candidates"][:2]] == [1.0, None]
    assert told["margin"] is None
    json.dumps(decision.as_dict(), allow_nan=False)


def test_policies_without_costs_have_records_too() -> None:
    decision = Decision("r", "m", 320, 0.0)
    decision.placed(placed("w0", []))
    (told,) = decision.as_dict()["placements"]
    assert told["runner_up"] is None and told["candidates"][0]["cost"] is None


def test_a_few_wrong_tokens_are_no_drift_and_it_ends_when_predictions_are_right_again() -> None:
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


def test_a_policys_odd_costs_do_not_fail_the_record() -> None:
    decision = Decision("r", "m", 320, 0.0)
    decision.placed(placed("w0", [1.0, 2.0]))
    decision.placed(placed("w0", [np.float64(i) for i in range(200)]))
    short, foreign = decision.as_dict()["placements"]
    assert short["candidates"][0]["cost"] is None
    assert foreign["candidates"][1]["cost"] == 1.0 and foreign["margin"] == 1.0
    json.dumps(decision.as_dict(), allow_nan=False)
