"""Real processes on real planes: correct answers, freed resources, killed processes, and every order of starting."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from dynserve.config import TINY_MODEL
from tests.conftest import MODEL, Deployment, Server

GOLDEN = json.loads((Path(__file__).parent / "golden" / "tiny_model.json").read_text())
CHAT: Any = [{"role": "user", "content": "What is 3+4?"}]


def ask(prompt: list[int], max_tokens: int = 24, **more: Any) -> dict[str, Any]:
    """Returns the body of a greedy request for exactly `max_tokens` tokens, special tokens included."""
    return {"model": MODEL, "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0, "skip_special_tokens": False} | more  # fmt: skip


def golden_text(case: dict[str, Any]) -> str:
    from tokenizers import Tokenizer

    text: str = Tokenizer.from_file(str(TINY_MODEL / "tokenizer.json")).decode(
        case["answer"], skip_special_tokens=False
    )
    return text


async def texts(base: str, bodies: list[dict[str, Any]], at_once: int) -> list[str]:
    gate = asyncio.Semaphore(at_once)
    async with httpx.AsyncClient(base_url=base, timeout=60, trust_env=False) as client:

        async def one(body: dict[str, Any]) -> str:
            async with gate:
                response = await client.post("/v1/completions", json=body)
                assert response.status_code == 200, response.text
                text: str = response.json()["choices"][0]["text"]
                return text

        return await asyncio.gather(*(one(body) for body in bodies))


def assert_all_free(deployment: Deployment) -> None:
    deadline = time.monotonic() + 10
    while True:
        healths = deployment.worker_health()
        free = all(h["load"]["free_blocks"] == h["load"]["total_blocks"] for h in healths)
        if free and not any(h["load"]["open_handoffs"] for h in healths):
            break
        assert time.monotonic() < deadline, healths
        time.sleep(0.1)
    for health in healths:
        r = health["requests"]
        assert r.get("accepted", 0) == r.get("finished", 0) + r.get("failed", 0) + r.get("cancelled", 0)


@pytest.mark.parametrize("at_once", [1, 32])
async def test_answers_through_four_workers_are_those_of_hugging_face(disaggregated: Deployment, at_once: int) -> None:
    found = await texts(disaggregated.base, [ask(case["prompt"]) for case in GOLDEN], at_once)
    assert found == [golden_text(case) for case in GOLDEN]


async def test_shared_prefixes_change_no_answer_and_are_cached(disaggregated: Deployment) -> None:
    prefix = max((case["prompt"] for case in GOLDEN), key=len)[:256]
    bodies = [ask([*prefix, *GOLDEN[i]["prompt"][:40]], 12) for i in range(32)]
    first = await texts(disaggregated.base, bodies, 32)
    assert await texts(disaggregated.base, bodies, 1) == first
    response = httpx.post(f"{disaggregated.base}/v1/completions", json=bodies[0], timeout=30, trust_env=False).json()
    assert response["usage"]["prompt_tokens_details"]["cached_tokens"] >= 256


async def test_preemption_and_chunked_prefill_change_no_answer(deploy: Any) -> None:
    deployment: Deployment = deploy()
    deployment.frontend("--router-mode", "round-robin")
    tight = {"num_blocks": 20, "max_num_tokens": 64}
    for role in ("prefill", "prefill", "decode", "decode"):
        deployment.worker(role, engine=tight)
    deployment.wait_for(4)
    # two of the long answers are more than a worker's blocks; they go first, so that all of them are there at once
    bodies = [ask(case["prompt"][:30], 320) for case in GOLDEN[:4]] + [ask(case["prompt"]) for case in GOLDEN[:25]]
    roomy = await texts(deployment.base, bodies[:4], 1)
    found = await texts(deployment.base, bodies, 29)
    assert found[:4] == roomy
    assert found[4:] == [golden_text(case) for case in GOLDEN[:25]]
    pages = [httpx.get(f"{i['address']}/metrics", trust_env=False).text for i in deployment.health()["instances"]]
    lines = [
        line for page in pages for line in page.splitlines() if line.startswith("dynserve_worker_preemptions_total")
    ]
    assert sum(float(line.split()[-1]) for line in lines) > 0
    assert_all_free(deployment)
    deployment.stop()


async def test_500_requests_of_which_a_third_is_cancelled_free_everything(disaggregated: Deployment) -> None:
    r = random.Random(3)
    gate = asyncio.Semaphore(40)
    async with httpx.AsyncClient(base_url=disaggregated.base, timeout=60, trust_env=False) as client:

        async def one(i: int) -> str:
            async with gate:
                prompt = [r.randrange(3, 2048) for _ in range(r.randint(1, 200))]
                body = ask(prompt, r.randint(1, 24), stream=bool(i % 2))
                asking = asyncio.create_task(client.post("/v1/completions", json=body))
                if i % 3 == 0:
                    await asyncio.sleep(r.random() * 0.3)
                    asking.cancel()
                await asyncio.wait([asking])
                return "cancelled" if asking.cancelled() else str(asking.result().status_code)

        outcomes = await asyncio.gather(*(one(i) for i in range(500)))
    assert set(outcomes) <= {"200", "cancelled"} and outcomes.count("cancelled") > 50
    assert_all_free(disaggregated)


def test_two_frontends_share_their_placements(deploy: Any) -> None:
    deployment, other = deploy(), deploy()
    other.planes = deployment.planes
    deployment.frontend()
    other.frontend()
    deployment.worker("prefill_and_decode", "--executor", "simulated", engine={"step_ms": 20})
    (worker,) = deployment.wait_for(1)
    other.wait_for(1)
    body = {"model": MODEL, "prompt": [300] * 100, "max_tokens": 400, "ignore_eos": True, "stream": True}

    def placed() -> dict[str, Any]:
        (instance,) = other.health()["instances"]
        return instance["placed"]  # type: ignore[no-any-return]

    with httpx.stream("POST", f"{deployment.base}/v1/completions", json=body, timeout=30, trust_env=False) as answer:
        lines = answer.iter_lines()  # a generator that is dropped closes the answer
        next(lines)
        wait_until(lambda: placed()["requests"] == 1 and placed()["decode_tokens"] >= 100)
    wait_until(lambda: placed() == {"requests": 0, "prefill_tokens": 0, "decode_tokens": 0})
    why = httpx.get(f"{deployment.base}/v1/requests/{answer.headers['x-request-id']}/why", trust_env=False).json()
    assert why["outcome"] == "cancelled" and why["placements"][0]["worker"] == worker["id"]


def wait_until(condition: Any, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not become true in time"
        time.sleep(0.02)


async def test_the_openai_sdk_chats_and_completes_streamed_and_not(disaggregated: Deployment) -> None:
    async with openai.AsyncOpenAI(base_url=f"{disaggregated.base}/v1", api_key="none", max_retries=0) as client:
        assert [m.id async for m in client.models.list()] == [MODEL]
        chat = await client.chat.completions.create(model=MODEL, messages=CHAT)
        assert chat.choices[0].message.content == "7" and chat.choices[0].finish_reason == "stop"
        assert chat.usage is not None and chat.usage.total_tokens == chat.usage.prompt_tokens + 2
        chunks = [
            chunk
            async for chunk in await client.chat.completions.create(
                model=MODEL,
                messages=CHAT,
                stream=True,
                logprobs=True,
                top_logprobs=2,
                stream_options={"include_usage": True},
            )
        ]
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "7"
        assert chunks[-1].usage is not None
        completion = await client.completions.create(model=MODEL, prompt="one, two, three,", max_tokens=4)
        assert completion.choices[0].text.startswith(" four")
        streamed = await client.completions.create(model=MODEL, prompt="one, two, three,", max_tokens=4, stream=True)
        assert "".join([c.choices[0].text async for c in streamed if c.choices]) == completion.choices[0].text
        with pytest.raises(openai.NotFoundError, match="nobody"):
            await client.chat.completions.create(model="nobody", messages=CHAT)


def test_a_killed_worker_is_removed_from_health_within_three_seconds(deploy: Any) -> None:
    deployment: Deployment = deploy()
    deployment.frontend()
    workers = [
        deployment.worker(role, "--executor", "simulated", engine={"speed": 0})
        for role in ("prefill", "decode", "decode")
    ]
    deployment.wait_for(3)
    workers[2].kill(signal.SIGKILL)
    began = time.monotonic()
    while len(deployment.health()["instances"]) == 3:
        assert time.monotonic() - began < 3
        time.sleep(0.02)
    answer = httpx.post(
        f"{deployment.base}/v1/chat/completions", json={"model": MODEL, "messages": CHAT}, timeout=10, trust_env=False
    )
    assert answer.status_code == 200
    # a stopped process sends nothing, and does not close its sockets either
    workers[1].kill(signal.SIGSTOP)
    began = time.monotonic()
    while len(deployment.health()["instances"]) == 2:
        assert time.monotonic() - began < 4
        time.sleep(0.02)
    workers[1].kill(signal.SIGCONT)
    deployment.wait_for(2)
    deployment.stop()


def test_a_worker_finishes_its_requests_after_sigterm(deploy: Any) -> None:
    deployment: Deployment = deploy()
    deployment.frontend()
    worker = deployment.worker("prefill_and_decode", "--executor", "simulated", engine={"step_ms": 20})
    deployment.wait_for(1)
    url, body = f"{deployment.base}/v1/completions", ask([5, 6, 7], 60, stream=True)
    with httpx.stream("POST", url, json=body, timeout=30, trust_env=False) as response:
        lines = response.iter_lines()
        next(lines)
        worker.kill(signal.SIGTERM)
        rest = list(lines)
    assert "data: [DONE]" in rest
    assert worker.wait() == 0
    deployment.stop()


PARTS = ("etcd", "nats", "frontend", "worker")


# any part can be the first one and the last one, and any two come in either order
ORDERS = [PARTS[at:] + PARTS[:at] for at in range(4)]
ORDERS = [order for forth in ORDERS[:3] for order in (forth, forth[::-1])]


@pytest.mark.parametrize("orders", list(zip(ORDERS[::2], ORDERS[1::2], strict=True)), ids=lambda o: "-".join(o[0]))
def test_any_two_parts_start_in_either_order(deploy: Any, tmp_path: Path, orders: list[tuple[str, ...]]) -> None:
    """Two clusters start at a time, on as many cores."""
    clusters = []
    for number, order in enumerate(orders):
        folder = tmp_path / str(number)
        folder.mkdir()
        etcd, nats = Server("etcd", folder), Server("nats", folder)
        clusters.append((order, etcd, nats, deploy(etcd.url, nats.url)))
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda found: answers_when_started_in_order(*found), clusters)) == [200, 200]


def answers_when_started_in_order(order: tuple[str, ...], etcd: Server, nats: Server, deployment: Deployment) -> int:
    starters: dict[str, Any] = {
        "etcd": etcd.start,
        "nats": nats.start,
        "frontend": deployment.frontend,
        "worker": lambda: deployment.worker("prefill_and_decode", "--executor", "simulated", engine={"speed": 0}),
    }
    try:
        for part in order:
            starters[part]()
            time.sleep(0.1)
        deployment.wait_for(1, seconds=20)
        url = f"{deployment.base}/v1/chat/completions"
        return httpx.post(url, json={"model": MODEL, "messages": CHAT}, timeout=10, trust_env=False).status_code
    finally:
        deployment.stop()
        etcd.kill()
        nats.kill()


def test_a_worker_logs_which_server_it_waits_for(deploy: Any, tmp_path: Path) -> None:
    etcd, nats = Server("etcd", tmp_path), Server("nats", tmp_path)
    deployment: Deployment = deploy(etcd.url, nats.url)
    worker = deployment.worker("prefill_and_decode", "--executor", "simulated", engine={"speed": 0})
    deadline = time.monotonic() + 15
    while f"waiting for NATS at {nats.url}" not in worker.output():
        assert time.monotonic() < deadline, worker.output()
        time.sleep(0.05)
    nats.start()
    while f"waiting for etcd at {etcd.url}" not in worker.output():
        assert time.monotonic() < deadline, worker.output()
        time.sleep(0.05)
    worker.kill(signal.SIGTERM)
    assert worker.wait() == 0
    nats.kill()


@pytest.mark.parametrize(
    ("module", "flags", "message"),
    [
        ("worker", ["--model-path", "/nowhere"], "--model-path /nowhere does not exist"),
        ("worker", ["--modle-path", "x"], "unknown option --modle-path (did you mean --model-path?)"),
        ("worker", ["--executor", "trtllm"], "--executor trtllm needs TensorRT-LLM, which cannot be imported here"),
        ("worker", ["--model", "x"], "unknown option --model: use --model-path instead"),
        ("worker", ["--is-prefill-worker"], "use --disaggregation-mode prefill instead"),
        ("worker", ["--gpu-memory-utilization", "0.9"], "use --free-gpu-memory-fraction instead"),
        ("worker", ["--max-model-len=4096"], "use --max-seq-len instead"),
        ("frontend", ["--router-mode", "magic"], "'magic' is not one of kv, round-robin, random"),
        ("frontend", ["--router-policy", "no_such_module:Class"], "cannot import no_such_module"),
        ("frontend", ["--router-herd-factor", "0.5"], "--router-herd-factor must be 1 or more"),
        ("frontend", ["--router-overlap-wait", "3"], "did you mean --router-overlap-weight"),
        ("worker", ["--kv-events", "maybe"], "--kv-events"),
    ],
)
def test_an_invalid_flag_is_an_error_without_traceback_and_exit_code_2(
    servers: tuple[str, str], module: str, flags: list[str], message: str
) -> None:
    planes = ["--etcd-url", servers[0], "--nats-url", servers[1]]
    done = subprocess.run(
        [sys.executable, "-m", f"dynserve.{module}", *planes, *flags], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr


def test_importing_dynserve_imports_neither_torch_nor_fastapi() -> None:
    code = "import sys, dynserve; sys.exit(any(m in sys.modules for m in ('torch', 'fastapi', 'tokenizers', 'nats')))"
    assert subprocess.run([sys.executable, "-c", code], timeout=30).returncode == 0
    code = "import sys, dynserve.frontend.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=30).returncode == 0


def test_requests_succeed_without_nats_and_etcd_and_new_workers_join_later(deploy: Any, tmp_path: Path) -> None:
    etcd, nats = Server("etcd", tmp_path), Server("nats", tmp_path)
    etcd.start()
    nats.start()
    deployment: Deployment = deploy(etcd.url, nats.url)
    engine = {"speed": 0}
    deployment.frontend()
    for role in ("prefill", "decode"):
        deployment.worker(role, "--executor", "simulated", engine=engine)
    deployment.wait_for(2)

    def answered() -> bool:
        body = {"model": MODEL, "messages": CHAT}
        return (
            httpx.post(f"{deployment.base}/v1/chat/completions", json=body, timeout=10, trust_env=False).status_code
            == 200
        )

    try:
        nats.kill()
        assert all(answered() for _ in range(5))
        etcd.kill()
        assert all(answered() for _ in range(5))
        late = deployment.worker("decode", "--executor", "simulated", engine=engine)
        time.sleep(2)
        assert answered() and late.alive()
        nats.start()
        etcd.start()
        deployment.wait_for(3)
        assert answered()
    finally:
        deployment.stop()
        etcd.kill()
        nats.kill()
