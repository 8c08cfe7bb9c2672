"""TensorRT-LLM workers as real processes, with the deployment guide's option files and the double's engines in processes of
their own, which are killed and stopped. All tests share one cluster; tests that break something come last."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.conftest import DOUBLES, Deployment, Process
from tests.test_processes import GOLDEN, ask, assert_all_free, golden_text, texts, wait_until

GUIDE = Path(__file__).parent / "executors" / "trtllm" / "old_options"
STALL = 5.0  # seconds: a starved machine may hold up an engine for some
BLOCKS = 200


class Cluster:
    """Two prefill and two decode workers, with their processes."""

    def __init__(self, deployment: Deployment) -> None:
        self.deployment, self.base = deployment, deployment.base
        deployment.env = {"PYTHONPATH": str(DOUBLES), "DYN_ROUTER_MODE": "kv"}
        self.frontend = deployment.frontend()
        self.prefill = [self._worker("prefill"), self._worker("prefill")]
        # one that loses KV events as soon as two come at a time
        self.decode = [self._worker("decode"), self._worker("decode", event_buffer_max_size=2)]
        deployment.wait_for(4)

    def _worker(self, role: str, **cache: Any) -> Process:
        flags = ("--executor", "trtllm", "--extra-engine-args", str(GUIDE / f"trtllm-{role}-config.yaml"))
        engine = {
            "kv_cache_config": {"max_tokens": BLOCKS * 32} | cache,
            "cache_transceiver_config": {
                "kv_transfer_timeout_ms": 4000
            },  # hand-offs that nobody fetches hold blocks so long
        }
        return self.deployment.worker(role, *flags, "--engine-stall-s", str(STALL), engine=engine)

    def address(self, process: Process) -> str:
        found: list[str] = [i["address"] for i in self.deployment.health()["instances"] if i["pid"] == process.pid]
        return found[0]

    def health(self, process: Process) -> dict[str, Any]:
        found: dict[str, Any] = httpx.get(f"{self.address(process)}/health", timeout=5, trust_env=False).json()
        return found

    def metric(self, process: Process, name: str) -> float:
        return metric(self.address(process), name)


def metric(address: str, name: str) -> float:
    page = httpx.get(f"{address}/metrics", timeout=5, trust_env=False).text
    return next((float(line.split()[-1]) for line in page.splitlines() if line.startswith(name)), 0.0)


def engine_of(process: Process) -> psutil.Process:
    (engine,) = (p for p in psutil.Process(process.pid).children() if "tensorrt_llm._engine" in p.cmdline())
    return engine


@pytest.fixture(scope="module")
def cluster(deploy: Any) -> Iterator[Cluster]:
    made = Cluster(deploy())
    yield made
    made.deployment.stop()


async def test_answers_with_the_guides_option_files_are_those_of_hugging_face(cluster: Cluster) -> None:
    found = await texts(cluster.base, [ask(case["prompt"]) for case in GOLDEN], 32)
    assert found == [golden_text(case) for case in GOLDEN]
    assert_all_free(cluster.deployment)
    assert sum(cluster.metric(w, "dynserve_worker_handoffs_delivered_total") for w in cluster.prefill) > 0
    assert sum(cluster.metric(w, "dynserve_worker_kv_transfers_failed_total") for w in cluster.decode) == 0
    assert cluster.health(cluster.decode[0])["executor"]["tensorrt_llm"] == "1.3.0rc29"


def test_old_spellings_of_options_are_logged_once(cluster: Cluster) -> None:
    for worker in cluster.prefill:
        assert worker.output().count("spellings that TensorRT-LLM no longer accepts") == 1


async def test_requests_go_where_their_prefix_is_cached(cluster: Cluster) -> None:
    prefix = max((case["prompt"] for case in GOLDEN), key=len)[:256]
    bodies = [ask([*prefix, *GOLDEN[i]["prompt"][:40]], 12) for i in range(24)]
    assert await texts(cluster.base, bodies, 1) == await texts(cluster.base, bodies, 24)
    answer = httpx.post(f"{cluster.base}/v1/completions", json=bodies[0], timeout=30, trust_env=False)
    assert answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] >= 256
    url = f"{cluster.base}/v1/requests/{answer.headers['x-request-id']}/why"
    placement = httpx.get(url, trust_env=False).json()["placements"][0]
    assert placement["predicted_cached_tokens"] >= 256
    assert {c["index"] for c in placement["candidates"]} == {"exact"}


async def test_clients_that_disconnect_free_all_blocks(cluster: Cluster) -> None:
    """Otherwise they would hold ten times as many blocks as there are."""
    async with httpx.AsyncClient(base_url=cluster.base, timeout=60, trust_env=False) as client:

        async def leave(i: int) -> None:
            body = ask([300 + i] * 300, 400, stream=True)
            asking = asyncio.create_task(client.post("/v1/completions", json=body))
            await asyncio.sleep(0.01 * (i % 30))
            asking.cancel()
            await asyncio.wait([asking])

        for start in range(0, 200, 20):
            await asyncio.gather(*(leave(i) for i in range(start, start + 20)))
    assert_all_free(cluster.deployment)
    bodies = [ask([700 + i] * 1500, 8) for i in range(8)]  # each needs a fourth of a worker's blocks
    assert all(await texts(cluster.base, bodies, 8))


async def test_lost_kv_events_are_detected_and_routing_continues(cluster: Cluster) -> None:
    lossy = cluster.decode[1]
    bodies = [ask([900 + i] * 64, 60) for i in range(40)]
    await texts(cluster.base, bodies, 40)
    assert cluster.metric(lossy, "dynserve_worker_kv_event_gaps_total") > 0
    states = {instance["index"] for instance in cluster.deployment.health()["instances"]}
    assert states == {"exact"}, "blocks that it does not know are not reported as cached"


@pytest.fixture
def stream() -> Iterator[Any]:
    """Returns a function that reads a streamed answer in a thread; its future has the lines."""
    with ThreadPoolExecutor(8) as pool:

        def start(base: str, body: dict[str, Any]) -> Any:
            lines: list[str] = []

            def reading() -> list[str]:
                with contextlib.suppress(httpx.HTTPError):
                    with httpx.stream(
                        "POST", f"{base}/v1/completions", json=body, timeout=60, trust_env=False
                    ) as answer:
                        for line in answer.iter_lines():
                            lines.append(line)
                return lines

            return pool.submit(reading), lines

        yield start


def test_a_killed_prefill_engine_fails_no_request_and_ends_its_worker(cluster: Cluster, stream: Any) -> None:
    victim = cluster.prefill[0]
    running = [stream(cluster.base, ask([1100 + i] * 200, 30, stream=True)) for i in range(8)]
    engine_of(victim).kill()
    ends = [future.result(timeout=60) for future, _ in running]
    assert all("data: [DONE]" in lines for lines in ends)
    assert victim.wait() == 3
    assert "RuntimeError: MPI worker rank 0 exited unexpectedly" in victim.output()
    assert "shutdown of a dead engine" not in victim.output()
    wait_until(lambda: len(cluster.deployment.health()["instances"]) == 3)


def test_the_answers_of_a_killed_decode_engine_migrate(cluster: Cluster, stream: Any) -> None:
    running = [stream(cluster.base, ask([1200 + i] * 20, 1000, stream=True)) for i in range(6)]
    wait_until(lambda: all(len(lines) > 20 for _, lines in running))
    victim, other = cluster.decode
    shares = [cluster.health(worker)["load"]["running"] for worker in (victim, other)]
    assert min(shares) > 0 and sum(shares) == 6, "both have some of them"
    engine_of(victim).kill()
    assert victim.wait() == 3
    wait_until(lambda: len(cluster.deployment.health()["instances"]) == 2)
    ends = [future.result(timeout=60) for future, _ in running]
    assert all("data: [DONE]" in lines and "event: error" not in lines for lines in ends)
    assert all(sum('"finish_reason":"length"' in line for line in lines) == 1 for lines in ends)
    answer = httpx.post(f"{cluster.base}/v1/completions", json=ask([5, 6, 7]), timeout=30, trust_env=False)
    assert answer.status_code == 200


def test_a_hand_off_whose_frontend_died_is_cancelled(cluster: Cluster, stream: Any) -> None:
    prefill, decode = cluster.prefill[1], cluster.decode[1]
    address = cluster.address(prefill)
    decode.kill(signal.SIGSTOP)
    try:
        future, _ = stream(cluster.base, ask([1300] * 200, 30, stream=True))

        value = partial(metric, address)
        wait_until(lambda: value("dynserve_worker_open_handoffs") == 1)
        before = value("dynserve_worker_handoffs_cancelled_total")
        cluster.frontend.kill()
        wait_until(lambda: value("dynserve_worker_open_handoffs") == 0)
        assert value("dynserve_worker_handoffs_cancelled_total") == before + 1
        future.result(timeout=60)
    finally:
        decode.kill(signal.SIGCONT)


def test_an_engine_that_stops_answering_ends_its_worker(cluster: Cluster) -> None:
    victim = cluster.prefill[1]
    engine = engine_of(victim)
    engine.send_signal(signal.SIGSTOP)
    try:
        assert victim.wait(timeout=4 * STALL + 10) == 3
        assert "not even one token" in victim.output()
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            engine.kill()


def test_a_dead_engine_of_version_1_2_is_detected_by_its_silence(deploy: Any) -> None:
    deployment: Deployment = deploy()
    deployment.env = {"PYTHONPATH": str(DOUBLES), "TRTLLM_DOUBLE_VERSION": "1.2.1"}
    worker = deployment.worker("prefill_and_decode", "--executor", "trtllm", "--engine-stall-s", "0.7")
    wait_until(lambda: "serves tiny_model" in worker.output(), 30)
    engine_of(worker).kill()
    assert worker.wait(timeout=20) == 3
    assert "the engine is dead: it has blocked the event loop" in worker.output()


def test_a_worker_shuts_its_engine_down_after_sigterm(deploy: Any) -> None:
    deployment: Deployment = deploy()
    deployment.env = {"PYTHONPATH": str(DOUBLES)}
    worker = deployment.worker("prefill_and_decode", "--executor", "trtllm")
    wait_until(lambda: "serves tiny_model" in worker.output(), 30)
    engine = engine_of(worker)
    worker.kill(signal.SIGTERM)
    assert worker.wait() == 0
    assert not engine.is_running()


@pytest.mark.parametrize(
    ("flags", "env", "message"),
    [
        (["--disaggregation-mode", "prefill"], {}, "a prefill worker needs a cache_transceiver_config"),
        (["--disaggregation-mode", "decode"], {}, "a decode worker needs a cache_transceiver_config"),
        (
            ["--disaggregation-mode", "prefill", "--extra-engine-args", str(GUIDE / "trtllm-prefill-config.yaml")],
            {"NIXL_PLUGINS_DIR": "/nowhere"},
            "NIXL_PLUGINS_DIR=/nowhere holds no libplugin_*.so: NIXL would crash there",
        ),
        (
            ["--override-engine-args", '{"max_batchsize": 3}'],
            {},
            "unknown key 'max_batchsize' (did you mean max_batch_size?)",
        ),
    ],
)
def test_invalid_options_are_an_error_and_exit_code_2_without_traceback(
    servers: tuple[str, str], flags: list[str], env: dict[str, str], message: str
) -> None:
    command = [sys.executable, "-m", "dynserve.worker", "--executor", "trtllm", *flags]
    command += ["--etcd-url", servers[0], "--nats-url", servers[1]]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=30, env=os.environ | {"PYTHONPATH": str(DOUBLES)} | env
    )
    assert done.returncode == 2, done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr


def test_the_double_crashes_without_nixl_plugins_as_the_real_engine_does(servers: tuple[str, str]) -> None:
    """The check in the test above prevents this crash."""
    code = (
        "import tensorrt_llm; tensorrt_llm.LLM('dynserve/local/tiny_model', skip_tokenizer_init=True,"
        " cache_transceiver_config={'backend': 'NIXL'})"
    )
    env = os.environ | {"PYTHONPATH": str(DOUBLES), "NIXL_PLUGINS_DIR": "/nowhere"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=30, env=env)
    assert done.returncode == -signal.SIGSEGV
