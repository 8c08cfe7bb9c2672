"""A frontend that stalls for a while loses no link, and its streams continue."""

from __future__ import annotations

import json
import signal
import threading
import time
from typing import Any

import httpx

from dynserve.transport.link import SILENCE
from tests.conftest import MODEL


def test_streams_continue_after_their_frontend_has_stalled(deploy: Any) -> None:
    deployment = deploy()
    frontend = deployment.frontend()
    worker = deployment.worker("prefill_and_decode", "--executor", "simulated", engine={"step_ms": 20})
    deployment.wait_for(1)
    seen: list[str] = []

    def read() -> None:
        ask = {"model": MODEL, "prompt": "one two", "max_tokens": 300, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{deployment.base}/v1/completions", json=ask, timeout=60, trust_env=False) as answer:
            seen.extend(line for line in answer.iter_lines() if line)

    reading = threading.Thread(target=read)
    reading.start()
    while not seen:
        time.sleep(0.05)
    frontend.kill(signal.SIGSTOP)
    time.sleep(SILENCE + 1.5)
    frontend.kill(signal.SIGCONT)
    reading.join(60)
    tokens = [line for line in seen if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["text"]]
    assert seen[-1] == "data: [DONE]" and len(tokens) > 200
    assert "silent" not in worker.output() and "gone" not in frontend.output()
