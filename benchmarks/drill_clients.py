"""The clients of `drills.py`: closed loops of streamed requests that know the right answers.

A client's kind decides what it does after a failure: `Client` counts each one, `RetryingClient` sends the request again. A
further kind overrides `ask`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from secrets import token_hex
from typing import Any, NamedTuple

from drill_cluster import BATCH, HOST

from dynserve.config import TINY_MODEL

TOKENS = 80  # per answer
REQUEST = 60.0  # seconds after which a client gives a request up
PAUSE = 0.1  # seconds between a failure and the client's next request


class Prompt(NamedTuple):
    """A prompt and the text of its right answer."""

    text: str
    expected: str


@dataclass
class Attempt:
    """One HTTP exchange, as far as it went."""

    fault: str = ""  # of the connection: refused, broken or timeout
    status: int = 0
    headers: bytes = b""
    body: bytes = b""


@dataclass
class Answer:
    """One request as its client saw it, over all attempts."""

    began: float
    times: list[float] = field(default_factory=list)  # when data arrived
    ended: float = 0.0
    failure: str = ""  # the kind of failure; empty: none
    wrong: str = ""  # what was wrong with the content; empty: nothing
    retry_after: float = PAUSE


class Client:
    """Streams one completion after the other, without retries, until `stop` is set. Each request has a connection of its
    own, so that a failure is never that of an idle connection which the server was about to close."""

    def __init__(self, port: int, prompts: Iterator[Prompt], stop: asyncio.Event) -> None:
        self._port, self._prompts, self._stop = port, prompts, stop
        self.answers: list[Answer] = []

    async def run(self) -> None:
        while not self._stop.is_set():
            prompt = next(self._prompts)
            answer = Answer(time.monotonic())
            attempt = await self.ask(prompt, answer)
            answer.ended = time.monotonic()
            _judge(answer, attempt, prompt.expected)
            self.answers.append(answer)
            if answer.failure:
                await asyncio.sleep(answer.retry_after)

    async def ask(self, prompt: Prompt, answer: Answer) -> Attempt:
        """Returns the attempt that decides over the request. Notes in `answer` when data arrived."""
        return await exchange(self._port, completion(prompt.text), answer.times)


class RetryingClient(Client):
    """A client that sends a request again when its connection is refused or breaks, and begins a broken answer anew."""

    async def ask(self, prompt: Prompt, answer: Answer) -> Attempt:
        deadline = time.monotonic() + REQUEST
        while True:
            attempt = await super().ask(prompt, answer)
            if attempt.fault not in ("refused", "broken") or time.monotonic() > deadline:
                return attempt
            answer.wrong = answer.wrong or _wrong_part(attempt, prompt.expected)
            await asyncio.sleep(PAUSE)


class ResumableClient(Client):
    """A client that comes back for the rest of its answer when its connection breaks."""

    async def ask(self, prompt: Prompt, answer: Answer) -> Attempt:
        deadline, whole, name = time.monotonic() + REQUEST, Attempt(), token_hex(8)
        while True:
            headers = {"x-request-id": name, "x-dynserve-resumable": "1"}
            if whole.body:  # the ids of the events that have arrived completely
                headers["last-event-id"] = whole.body.rpartition(b"id: ")[2].partition(b"\n")[0].decode()
            attempt = await exchange(self._port, completion(prompt.text, headers=headers), answer.times)
            complete = attempt.body[: attempt.body.rfind(b"\n\n") + 2] if attempt.status == 200 else b""
            if attempt.fault not in ("refused", "broken") or time.monotonic() > deadline:
                return replace(attempt, body=whole.body + attempt.body) if attempt.status == 200 else attempt
            whole.body += complete
            await asyncio.sleep(PAUSE)


def completion(prompt: str, *, stream: bool = True, headers: Mapping[str, str] | None = None) -> bytes:
    """The HTTP request for an answer of `TOKENS` tokens."""
    body: dict[str, Any] = {"model": TINY_MODEL.name, "prompt": prompt, "max_tokens": TOKENS, "ignore_eos": True}
    body |= {"temperature": 0, "stream": stream} | ({"stream_options": {"include_usage": True}} if stream else {})
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {HOST}\r\nconnection: close\r\ncontent-type: application/json\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
    return f"{head}content-length: {len(data)}\r\n\r\n".encode() + data


async def exchange(port: int, request: bytes, times: list[float]) -> Attempt:
    """Sends a request and reads its response to the end. Appends the times of arrival to `times`."""
    attempt, writer, received = Attempt(), None, bytearray()
    try:
        async with asyncio.timeout(REQUEST):
            reader, writer = await asyncio.open_connection(HOST, port)
            writer.write(request)
            attempt.headers = await reader.readuntil(b"\r\n\r\n")
            attempt.status = int(attempt.headers.split(b" ", 2)[1])
            while data := await reader.read(1 << 16):
                received += data
                if b"data: {" in data:
                    times.append(time.monotonic())
    except TimeoutError:
        attempt.fault = "timeout"
    except (OSError, EOFError) as error:
        attempt.fault = "refused" if isinstance(error, ConnectionRefusedError) else "broken"
    finally:
        if writer is not None:
            writer.close()
    chunked = b"\r\ntransfer-encoding: chunked" in attempt.headers.lower()
    attempt.body, complete = _without_chunks(bytes(received)) if chunked else (bytes(received), True)
    attempt.fault = attempt.fault or ("" if complete else "broken")
    return attempt


def _without_chunks(data: bytes) -> tuple[bytes, bool]:
    """Removes the chunked encoding. Returns the content, and whether it has its end."""
    at, parts = 0, list[bytes]()
    while (line_end := data.find(b"\r\n", at)) >= 0:
        size = int(data[at:line_end], 16)
        if not size:
            return b"".join(parts), True
        at = line_end + 2 + size + 2
        parts.append(data[line_end + 2 : at - 2])
    return b"".join(parts), False


class _Stream(NamedTuple):
    text: str
    error: str  # the code of an error event
    ends: tuple[int, int, int]  # finish reasons, [DONE]s and tokens of the usage


def _parse(body: bytes) -> _Stream:
    """Parses a stream of events, of which the last may be incomplete."""
    text, error, reasons, tokens = "", "", 0, 0
    events = [event.rpartition(b"data: ")[2] for event in body.split(b"\n\n")[:-1]]
    for event in events:
        if not event.startswith(b"{"):
            continue
        content: Mapping[str, Any] = json.loads(event)
        if "error" in content:
            error = str(content["error"].get("code") or content["error"].get("type"))
        for choice in content.get("choices", ()):
            text += choice["text"]
            reasons += choice["finish_reason"] is not None
        tokens += (content.get("usage") or {}).get("completion_tokens", 0)
    return _Stream(text, error, (reasons, events.count(b"[DONE]"), tokens))


def _wrong_part(attempt: Attempt, expected: str) -> str:
    """Returns what is wrong with an incomplete answer, which must be the beginning of the right one."""
    if attempt.status == 200 and not expected.startswith(_parse(attempt.body).text):
        return "text before the failure"
    return ""


def _judge(answer: Answer, attempt: Attempt, expected: str) -> None:
    """Compares the last attempt of a request with the right answer."""
    if attempt.status not in (0, 200) and not attempt.fault:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            answer.failure = f"{attempt.status} {json.loads(attempt.body)['error']['code']}"
        answer.failure = answer.failure or str(attempt.status)
        for line in attempt.headers.lower().splitlines():
            if line.startswith(b"retry-after:"):
                answer.retry_after = float(line.split(b":")[1])
        return
    stream = _parse(attempt.body)
    answer.failure = attempt.fault or (f"event {stream.error}" if stream.error else "")
    if answer.failure:
        answer.wrong = answer.wrong or _wrong_part(attempt, expected)
    elif stream.text != expected:
        answer.wrong = "text"
    elif stream.ends != (1, 1, TOKENS):
        answer.wrong = "finish reasons {}, [DONE] {}, tokens {}".format(*stream.ends)


async def make_prompts(port: int, count: int) -> list[Prompt]:
    """Asks a healthy cluster for the right answers, without streaming. Raises RuntimeError if it does not give them."""
    gate = asyncio.Semaphore(2 * BATCH)

    async def one(number: int) -> Prompt:
        text = f"{number:04d} " + " ".join(f"word{(number + i) % 7}" for i in range(60))
        async with gate:
            attempt = await exchange(port, completion(text, stream=False), [])
        if attempt.status != 200:
            raise RuntimeError(f"no answer to compare with: {attempt}")
        return Prompt(text, json.loads(attempt.body)["choices"][0]["text"])

    return list(await asyncio.gather(*map(one, range(count))))


class Load:
    """Closed-loop clients that run while the block is open, and then finish their current requests."""

    def __init__(self, port: int, prompts: Sequence[Prompt], clients: int, kind: type[Client] = Client) -> None:
        self._stop = asyncio.Event()
        self.clients = [kind(port, _from(prompts, at, clients), self._stop) for at in range(clients)]

    async def __aenter__(self) -> Load:
        self._tasks = [asyncio.create_task(client.run()) for client in self.clients]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stop.set()
        await asyncio.gather(*self._tasks)

    @property
    def answers(self) -> list[Answer]:
        return [answer for client in self.clients for answer in client.answers]


def _from(prompts: Sequence[Prompt], first: int, step: int) -> Iterator[Prompt]:
    """Endless prompts. Clients with different `first` never ask the same at the same time, if there are enough."""
    at = first
    while True:
        yield prompts[at % len(prompts)]
        at += step
