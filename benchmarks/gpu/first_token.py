"""Where the time of the first token goes, by length of the prompt, through a whole cluster.

    python benchmarks/gpu/first_token.py [--url http://127.0.0.1:8000] [--runs 15]

For each streamed request the client's time to first token stands beside what the cluster says of the same request
(`/v1/requests/{id}/why`): the frontend's own time to first token, the prefill in the engine, the transfer of the KV cache.
`elsewhere` is the rest: HTTP, tokenising, placing, NATS, links, the event loops of three processes.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import statistics
import time
from typing import Any
from urllib.parse import urlsplit

LENGTHS = (6, 64, 256, 1024, 4096, 16000)


def ask(netloc: str, model: str, length: int) -> tuple[float, dict[str, Any]]:
    """Seconds to the first token, and the cluster's record of the request."""
    connection = http.client.HTTPConnection(netloc, timeout=60)
    connection.connect()
    prompt = [random.randrange(1000, 100_000) for _ in range(length)]
    fields = {"model": model, "prompt": prompt, "max_tokens": 4, "temperature": 0, "stream": True, "ignore_eos": True}
    body = json.dumps(fields)
    began = time.perf_counter()
    connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise SystemExit(response.read().decode())
    response.readline()
    took = time.perf_counter() - began
    response.read()
    request_id = response.headers["x-request-id"]
    connection.request("GET", f"/v1/requests/{request_id}/why")
    told = json.loads(connection.getresponse().read())
    connection.close()
    return took, told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="m")
    parser.add_argument("--runs", type=int, default=15)
    args = parser.parse_args()
    netloc = urlsplit(args.url).netloc
    for _ in range(5):
        ask(netloc, args.model, 50)
    print("| prompt | client TTFT | frontend | queue | prefill | transfer | elsewhere |\n|---|---|---|---|---|---|---|")
    for length in LENGTHS:
        rows: list[list[float]] = []
        for _ in range(args.runs):
            took, told = ask(netloc, args.model, length)
            reported = [p["reported"] for p in told["placements"] if "reported" in p]
            queue = sum(r["queue_s"] for r in reported)
            prefill = max((r["prefill_s"] for r in reported), default=0.0)
            transfer = max((r["transfer_s"] for r in reported), default=0.0)
            rows.append([took, told.get("ttft_s") or 0.0, queue, prefill, transfer, took - prefill])
        columns = [f"{1e3 * statistics.median(column):.2f} ms" for column in zip(*rows, strict=True)]
        print(f"| {length} | " + " | ".join(columns) + " |", flush=True)


if __name__ == "__main__":
    main()
