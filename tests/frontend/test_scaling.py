"""The numbers for autoscalers in a frontend's /metrics."""

from __future__ import annotations

import asyncio

from dynserve.cluster import Cluster
from dynserve.frontend.objective import WINDOW, FirstTokenObjective
from tests.conftest import until


def test_the_objective_counts_the_last_minute() -> None:
    now = 1000.0
    objective = FirstTokenObjective(0.5, lambda: now)
    assert objective.missed_ratio() == 0
    for ttft in (0.1, 0.5, 0.6, 2.0):
        objective.observe(ttft)
    assert objective.missed_ratio() == 0.5
    now += WINDOW - 1
    objective.observe(0.1)
    assert objective.missed_ratio() == 2 / 5
    now += 1  # the first four are older than the window now
    assert objective.missed_ratio() == 0
    now += WINDOW - 1
    objective.observe(9.0)  # in a slot that was used before
    assert objective.missed_ratio() == 1


def test_requests_that_end_without_a_token_have_missed_it_if_they_waited_for_longer() -> None:
    objective = FirstTokenObjective(0.5)
    objective.gave_up(0.4)  # its client left early: that says nothing
    assert objective.missed_ratio() == 0
    objective.observe(0.1)
    objective.gave_up(30.0)
    assert objective.missed_ratio() == 0.5


async def test_a_request_that_times_out_in_the_queue_has_missed_the_objective() -> None:
    options = {"ttft_slo_ms": 50, "max_queued_s": 0.2, "busy_prefill_tokens": 1}
    engine = {"step_ms": 300, "num_blocks": 64}
    async with Cluster(aggregated=1, executor="simulated", engine=engine, options=options) as cluster:
        async with cluster.client() as client:
            body = {"model": cluster.model, "prompt": [7] * 320, "max_tokens": 50, "ignore_eos": True}
            first = asyncio.create_task(client.post("/v1/completions", json=body))
            await until(lambda: any(worker.executor.load().running for worker in cluster.workers))
            answer = await client.post("/v1/completions", json=body)
            text = (await client.get("/metrics")).text
            first.cancel()
            await asyncio.wait([first])
    assert answer.status_code in (429, 503), answer.text
    (line,) = [line for line in text.splitlines() if line.startswith("dynserve_ttft_slo_missed_ratio")]
    assert float(line.split()[-1]) > 0


async def test_metrics_have_occupancy_and_queues_of_each_role_and_the_share_that_missed_the_objective() -> None:
    engine = {"step_ms": 5, "num_blocks": 64, "max_batch_size": 1}
    options = {"ttft_slo_ms": 0.001}
    async with Cluster(prefill=1, decode=2, executor="simulated", engine=engine, options=options) as cluster:
        async with cluster.client() as client:

            async def values() -> dict[str, float]:
                lines = (await client.get("/metrics")).text.splitlines()
                found = [line.rsplit(" ", 1) for line in lines if line.startswith(("dynserve_role", "dynserve_ttft"))]
                return {name: float(value) for name, value in found}

            before = await values()
            assert before['dynserve_role_kv_occupancy{cluster="default",role="decode"}'] == 0
            assert before['dynserve_ttft_slo_missed_ratio{cluster="default"}'] == 0
            body = {"model": cluster.model, "prompt": [7] * 320, "max_tokens": 300, "ignore_eos": True}
            tasks = [asyncio.create_task(client.post("/v1/completions", json=body)) for _ in range(8)]
            seen: dict[str, float] = {}

            async def full() -> bool:
                nonlocal seen
                seen = await values()
                return seen['dynserve_role_kv_occupancy{cluster="default",role="decode"}'] > 0.1

            while not await full():
                await asyncio.sleep(0.02)
            # two workers of 64 blocks, with one answer of 10 to 20 blocks running in each
            assert 0.1 < seen['dynserve_role_kv_occupancy{cluster="default",role="decode"}'] <= 2
            for role in ("prefill", "decode"):  # three workers run one request each
                assert 4 <= seen[f'dynserve_role_queued_requests{{cluster="default",role="{role}"}}'] <= 7
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            assert (await client.post("/v1/completions", json=body | {"max_tokens": 1})).status_code == 200
            assert (await values())['dynserve_ttft_slo_missed_ratio{cluster="default"}'] == 1
            await until(lambda: all(worker.executor.load().running == 0 for worker in cluster.workers))


async def test_without_an_objective_there_is_no_share_that_missed_it() -> None:
    async with Cluster(aggregated=1, executor="simulated") as cluster, cluster.client() as client:
        text = (await client.get("/metrics")).text
        assert "dynserve_ttft_slo" not in text and 'role="prefill_and_decode"' in text
