from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from uvicorn.server import ServerState

import dynserve
from dynserve.cluster import Cluster
from dynserve.config import FrontendConfig
from dynserve.errors import ConfigError
from dynserve.server.heads import HttpLimits
from dynserve.server.protocol import BoundedProtocol
from dynserve.server.serving import Tls, bind, check_tls, serving
from tests.conftest import MODEL, until

ASK = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}


@asynccontextmanager
async def served(limits: HttpLimits | None = None, **options: Any) -> AsyncIterator[tuple[int, Cluster]]:
    """A frontend on a real socket, with a simulated worker behind it."""
    async with Cluster(aggregated=1, executor="simulated", engine={"speed": 0}, options=options) as cluster:
        sock = bind("127.0.0.1", 0, "--http-port")
        port = sock.getsockname()[1]
        async with serving(cluster.apps[0].served, sock, limits or HttpLimits()):
            yield port, cluster


async def raw(port: int, *parts: bytes, pause: float = 0.0) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for part in parts:
        writer.write(part)
        await asyncio.sleep(pause)
        if reader.at_eof() or writer.is_closing():
            break  # it has answered already
    async with asyncio.timeout(10):
        answer = await reader.read()
    writer.close()
    return answer


def error_of(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["message"]


async def test_headers_are_bounded_in_one_piece_and_in_many() -> None:
    async with served(HttpLimits(header_bytes=2000)) as (port, _):
        start = b"GET /live HTTP/1.1\r\nhost: localhost\r\n"
        whole = await raw(port, start + b"a: " + b"x" * 3000 + b"\r\n\r\n")
        assert error_of(whole) == (431, "the request's headers are too large")
        many = await raw(port, start, *[b"a%d: %b\r\n" % (i, b"x" * 90) for i in range(22)], pause=0.001)
        assert error_of(many)[0] == 431
        endless = await raw(port, start + b"a: ", *[b"x" * 500] * 5, pause=0.001)
        assert error_of(endless)[0] == 431
        fine = await raw(port, start + b"connection: close\r\n\r\n")
        assert fine.startswith(b"HTTP/1.1 200")


async def test_a_large_body_in_one_piece_with_its_headers_is_not_counted_as_headers() -> None:
    async with (
        served(HttpLimits(header_bytes=2000)) as (port, _),
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client,
    ):
        for _ in range(5):
            body = ASK | {"messages": [{"role": "user", "content": "word " * 1500}]}
            assert (await client.post("/v1/chat/completions", json=body)).status_code == 200


async def test_headers_that_do_not_arrive_in_time_are_answered_with_408() -> None:
    async with served(HttpLimits(header_s=0.2)) as (port, _):
        assert error_of(await raw(port, b"GET /live HTTP/1.1\r\nhost:"))[0] == 408
        assert error_of(await raw(port))[0] == 408


async def test_trailers_over_their_bound_close_the_connection() -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n1\r\n{\r\n0\r\n"
    async with served(HttpLimits(header_bytes=2000)) as (port, _):
        for trailers in ([b"a: b\r\n" * 100] * 40, [b"a: ", *[b"x" * 500] * 40]):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(head)
            for trailer in trailers:
                writer.write(trailer)
                await asyncio.sleep(0.001)
            async with asyncio.timeout(5):
                with contextlib.suppress(ConnectionError):
                    await reader.read()  # to the end: the connection is closed
            writer.close()


async def test_the_rest_of_an_unread_body_is_awaited_for_a_limited_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynserve.server.protocol.DRAIN", 0.2)
    start = b"POST /nowhere HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\n"
    async with served(HttpLimits(header_s=0.3)) as (port, _):
        answer = await raw(port, start, b"x", pause=0.05)
        assert answer.startswith(b"HTTP/1.1 404")  # and then the end
        monkeypatch.setattr("dynserve.server.protocol.DRAIN", 5.0)
        rest = b"x" * 1000 + b"GET /live HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
        assert (await raw(port, start, rest, pause=0.05)).count(b"HTTP/1.1") == 2


async def test_pipelined_requests_are_all_answered() -> None:
    body = b"x" * 3000
    post = b"POST /nowhere HTTP/1.1\r\nhost: localhost\r\ncontent-length: 3000\r\n\r\n"
    get = b"GET /live HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
    async with served(HttpLimits(header_bytes=2000)) as (port, _):
        answer = await raw(port, post[:20], post[20:] + body + get[:20], get[20:], pause=0.02)
        assert answer.count(b"HTTP/1.1 ") == 2 and b"HTTP/1.1 200" in answer
        plain = post.replace(b"POST", b"GET").replace(b"content-length: 3000\r\n", b"")
        assert (await raw(port, plain * 50 + get)).count(b"HTTP/1.1 ") == 51


@pytest.mark.parametrize("header", [b"connection: close\r\n", b"expect: 100-continue\r\n", b""])
async def test_a_client_that_is_still_sending_can_read_an_early_answer(header: bytes) -> None:
    async with served(max_body_bytes=1000) as (port, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n" + header + b"content-length: 4000000\r\n\r\n"
        )
        if b"expect" not in header:
            for _ in range(40):
                writer.write(b"x" * 100_000)
                await writer.drain()
        async with asyncio.timeout(10):
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 413") and (b"connection: close" in head.lower()) == bool(header)
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            assert json.loads(await reader.readexactly(length))["error"]["code"] == "body_too_large"
        writer.close()


async def test_an_invalid_chunk_in_a_body_is_answered_with_400() -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n"
    async with served() as (port, cluster):
        assert error_of(await raw(port, head, b"ZZ\r\nfoo\r\n", pause=0.05))[0] == 400
        await until(lambda: cluster.frontend.gate.open_requests.count == 0)


async def test_a_client_that_pipelines_and_reads_no_answer_is_disconnected() -> None:
    ask = b"GET /openapi.json HTTP/1.1\r\nhost: localhost\r\n\r\n"
    async with served(HttpLimits(write_s=0.3)) as (port, _):
        sock = socket.create_connection(("127.0.0.1", port))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        loop = asyncio.get_running_loop()

        async def ask_on() -> None:
            while True:
                await loop.sock_sendall(sock, ask * 20)
                await asyncio.sleep(0.02)

        with pytest.raises(ConnectionError):
            async with asyncio.timeout(40):
                await ask_on()
        sock.close()


async def test_an_empty_line_does_not_keep_a_connection_open() -> None:
    async with served(HttpLimits(header_s=0.3)) as (port, _):
        answer = await raw(port, b"GET /live HTTP/1.1\r\nhost: localhost\r\n\r\n", b"\r\n", pause=0.05)
        assert answer.startswith(b"HTTP/1.1 200") and b"408" in answer


async def test_invalid_bytes_after_a_request_do_not_change_its_answer() -> None:
    async with Cluster(aggregated=1, executor="simulated", engine={"step_ms": 20}) as cluster:
        sock = bind("127.0.0.1", 0, "--http-port")
        body = json.dumps(ASK | {"stream": True, "max_tokens": 400, "ignore_eos": True}).encode()
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % len(body)
        async with serving(cluster.app, sock):
            answer = await raw(sock.getsockname()[1], head + body, b"NONSENSE\r\n\r\n", pause=0.2)
        assert answer.startswith(b"HTTP/1.1 200") and answer.count(b"HTTP/1.1") == 1
        await until(lambda: cluster.frontend.gate.open_requests.count == 0)


async def test_an_upgrade_to_http2_is_ignored() -> None:
    body = json.dumps(ASK).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nconnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
    head += b"HTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\ncontent-length: %d\r\n\r\n" % len(body)
    async with served() as (port, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head + body)
        async with asyncio.timeout(10):
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        writer.close()


async def test_a_client_that_does_not_read_its_stream_is_disconnected(caplog: pytest.LogCaptureFixture) -> None:
    engine = {"speed": 0}
    options = {"max_stream_bytes": 200_000}
    async with Cluster(aggregated=1, executor="simulated", engine=engine, options=options) as cluster:
        sock = bind("127.0.0.1", 0, "--http-port")
        ask = {"model": MODEL, "prompt": ["x"] * 64, "max_tokens": 4000, "ignore_eos": True, "stream": True}
        body = json.dumps(ask).encode()
        async with serving(cluster.app, sock):
            reader, writer = await asyncio.open_connection("127.0.0.1", sock.getsockname()[1], limit=1000)
            writer.write(
                b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % len(body) + body
            )
            await until(lambda: cluster.frontend.gate.open_requests.count == 1)
            await until(lambda: cluster.frontend.gate.open_requests.count == 0, seconds=90)
            with contextlib.suppress(ConnectionError):
                assert b"[DONE]" not in await reader.read()
            writer.close()
    assert "without completing response" not in caplog.text and "cannot be handled" not in caplog.text


async def test_an_idle_keep_alive_connection_is_not_a_slow_request() -> None:
    async with (
        served(HttpLimits(header_s=0.2)) as (port, _),
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client,
    ):
        for _ in range(3):
            assert (await client.get("/live")).status_code == 200
            await asyncio.sleep(0.3)


async def test_bytes_that_are_not_http_are_answered_with_an_error_object() -> None:
    async with served() as (port, _):
        assert error_of(await raw(port, b"HELLO\r\n\r\n")) == (400, "this is not a valid HTTP request")


async def test_a_body_is_bounded_in_size_and_in_time() -> None:
    async with served(max_body_bytes=1000, receive_timeout_s=0.2) as (port, cluster):
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            large = await client.post("/v1/chat/completions", content=b"x" * 2000)
            assert large.status_code == 413 and large.json()["error"]["code"] == "body_too_large"
        head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: 50\r\n\r\n{"
        status, message = error_of(await raw(port, head))
        assert status == 408 and "did not arrive within" in message
        assert cluster.frontend.gate.open_requests.count == 0


async def test_cors_headers_are_sent_only_for_configured_origins() -> None:
    asking = {"origin": "https://a.example", "access-control-request-method": "POST"}
    for origins, allowed in ((None, None), ("https://a.example, https://b.example", "https://a.example"), ("*", "*")):
        async with served(cors_origins=origins) as (port, _):
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
                preflight = await client.options("/v1/chat/completions", headers=asking)
                assert preflight.headers.get("access-control-allow-origin") == allowed
                answer = await client.post("/v1/chat/completions", json=ASK, headers={"origin": "https://a.example"})
                assert answer.status_code == 200
                assert answer.headers.get("access-control-allow-origin") == allowed


async def test_requests_over_the_bound_are_refused_with_retry_after() -> None:
    engine = {"step_ms": 50}
    async with Cluster(aggregated=1, executor="simulated", engine=engine, options={"max_requests": 2}) as cluster:
        async with cluster.client() as client:
            asking = [asyncio.create_task(client.post("/v1/chat/completions", json=ASK)) for _ in range(2)]
            await until(lambda: cluster.frontend.gate.open_requests.count == 2)
            refused = await client.post("/v1/chat/completions", json=ASK)
            assert refused.status_code == 429 and refused.headers["retry-after"]
            assert (await client.get("/health")).status_code == 200
            assert [(await task).status_code for task in asking] == [200, 200]
            assert cluster.frontend.gate.open_requests.count == 0


async def test_strict_servers_refuse_unknown_fields() -> None:
    async with (
        served(strict_fields=True) as (port, _),
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client,
    ):
        refused = await client.post("/v1/chat/completions", json=ASK | {"tempratur": 1})
        assert refused.status_code == 400
        assert refused.json()["error"]["message"] == "unknown field tempratur (did you mean temperature?)"


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    return Tls(str(certificate), str(key))


async def test_https_is_served_with_a_certificate(pem: Tls) -> None:
    async with Cluster(aggregated=1, executor="simulated", engine={"speed": 0}) as cluster:
        sock = bind("127.0.0.1", 0, "--http-port")
        port = sock.getsockname()[1]
        trusted = ssl.create_default_context(cafile=pem.certificate)
        async with serving(cluster.app, sock, None, pem):
            async with httpx.AsyncClient(base_url=f"https://127.0.0.1:{port}", verify=trusted) as client:
                answer = await client.post("/v1/chat/completions", json=ASK | {"stream": True})
                assert answer.status_code == 200 and answer.text.endswith("data: [DONE]\n\n")


async def test_an_encrypted_tls_key_is_an_error_and_prompts_for_no_password(pem: Tls, tmp_path: Path) -> None:
    locked = tmp_path / "locked.pem"
    command = ["openssl", "rsa", "-aes256", "-passout", "pass:x", "-in", pem.key, "-out", str(locked)]
    subprocess.run(command, check=True, capture_output=True)
    with pytest.raises(ConfigError, match="is encrypted"):
        check_tls(Tls(pem.certificate, str(locked)))


async def test_an_invalid_or_missing_certificate_is_a_configuration_error(tmp_path: Path) -> None:
    sock = bind("127.0.0.1", 0, "--http-port")
    nothing = tmp_path / "empty.pem"
    nothing.write_text("")
    for path, message in (
        (str(nothing), "are not a pair"),
        ("/nowhere.pem", "--tls-certificate /nowhere.pem: .*No such file"),
    ):
        with pytest.raises(ConfigError, match=message):
            async with serving(lambda: None, sock, None, Tls(path, path)):
                pass
    sock.close()


@pytest.mark.parametrize("method", ["HEAD", "GET"])
async def test_an_answer_without_a_body_is_complete_before_anything_else_is_written(method: str) -> None:
    """For example the answer to an invalid request after it."""
    written: list[bytes] = []
    at_the_end: list[bytes] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})
        at_the_end.extend(written)

    class Noted(asyncio.Transport):
        def write(self, data: bytes | bytearray | memoryview) -> None:
            written.append(bytes(data))

        def is_closing(self) -> bool:
            return False

        def get_extra_info(self, name: str, default: Any = None) -> Any:
            return default

        def close(self) -> None:
            pass

    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", ws="none", proxy_headers=False)
    config.load()
    protocol = BoundedProtocol(config, ServerState(), {})
    protocol.connection_made(Noted())
    protocol.data_received(method.encode() + b" /live HTTP/1.1\r\nhost: localhost\r\n\r\n")
    await until(lambda: at_the_end)
    assert b"".join(at_the_end).startswith(b"HTTP/1.1 200") and at_the_end == written
    protocol.connection_lost(None)


async def test_short_answers_on_one_connection_are_complete_and_in_order() -> None:
    """They bypass ASGI."""
    async with served() as (port, _):
        body = json.dumps({"model": MODEL, "prompt": [5, 6], "max_tokens": 2, "ignore_eos": True}).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n" % len(body)
        bad = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 2\r\n\r\n{}"
        answer = await raw(port, (head + b"\r\n" + body) * 2 + bad + head + b"connection: close\r\n\r\n" + body)
        parts = answer.split(b"HTTP/1.1 ")[1:]
        assert [part[:3] for part in parts] == [b"200", b"200", b"400", b"200"]
        assert [b"\r\nconnection: close\r\n" in part for part in parts] == [False, False, False, True]
        for part in (parts[0], parts[1], parts[3]):
            fields, _, content = part.partition(b"\r\n\r\n")
            assert b"content-length: %d" % len(content) in fields and b"\r\ndate: " in fields
            assert json.loads(content)["usage"]["completion_tokens"] == 2


async def test_a_wrapper_of_the_application_sees_every_asgi_message() -> None:
    kinds: list[str] = []
    async with Cluster(aggregated=1, executor="simulated", engine={"speed": 0}) as cluster:

        async def wrapped(scope: Any, receive: Any, send: Any) -> None:
            async def noted(message: Any) -> None:
                kinds.append(message["type"])
                await send(message)

            await cluster.apps[0].served(scope, receive, noted)

        sock = bind("127.0.0.1", 0, "--http-port")
        port = sock.getsockname()[1]
        async with serving(wrapped, sock), httpx.AsyncClient() as client:
            completion = {"model": MODEL, "prompt": [5, 6], "max_tokens": 2}
            assert (await client.post(f"http://127.0.0.1:{port}/v1/completions", json=completion)).status_code == 200
    assert kinds == ["http.response.start", "http.response.body"]


async def test_an_immediate_answer_comes_after_100_continue() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        assert scope["dynserve"].respond(send, 200, [(b"content-length", b"2")], b"ok")

    sock = bind("127.0.0.1", 0, "--http-port")
    port = sock.getsockname()[1]
    async with serving(app, sock):
        head = b"POST / HTTP/1.1\r\nhost: localhost\r\nexpect: 100-continue\r\ncontent-length: 2\r\nconnection: close\r\n\r\n"
        answer = await raw(port, head + b"hi")
    first, _, second = answer.partition(b"\r\n\r\n")
    assert first == b"HTTP/1.1 100 Continue" and second.startswith(b"HTTP/1.1 200 OK\r\n") and second.endswith(b"ok")


# the edges of HTTP


def head_and_body(answer: bytes) -> tuple[bytes, bytes]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return head.lower(), body


def post(path: str, body: bytes, version: str = "1.1", **headers: str) -> bytes:
    fields = {"host": "localhost", "content-type": "application/json", "content-length": str(len(body))}
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in (fields | headers).items())
    return f"POST {path} HTTP/{version}\r\n{lines}\r\n".encode() + body


async def test_a_client_of_http_1_0_gets_its_answer_without_chunks() -> None:
    async with served() as (port, _):
        for stream in (False, True):
            body = json.dumps(ASK | {"stream": stream, "max_tokens": 3, "temperature": 0}).encode()
            head, found = head_and_body(await raw(port, post("/v1/chat/completions", body, "1.0")))
            assert b"200 ok" in head and b"chunked" not in head and b"connection: close" in head
            text = found.decode()
            if stream:
                assert text.startswith("data: {") and text.endswith("data: [DONE]\n\n")
            else:
                assert json.loads(text)["usage"]["completion_tokens"] == 3


@asynccontextmanager
async def connection_to_a_slow_model() -> AsyncIterator[tuple[Cluster, asyncio.StreamReader, asyncio.StreamWriter]]:
    engine = {"speed": 1, "step_ms": 20}
    async with Cluster(aggregated=1, executor="simulated", engine=engine) as cluster:
        sock = bind("127.0.0.1", 0, "--http-port")
        async with serving(cluster.apps[0].served, sock):
            reader, writer = await asyncio.open_connection(*sock.getsockname())
            yield cluster, reader, writer
            writer.close()


async def rest_of_answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    """Closes the sending side, and reads what still comes."""
    writer.write_eof()
    async with asyncio.timeout(20):
        return await reader.read()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_a_client_that_closes_its_sending_side_gets_its_answer(version: str, stream: bool) -> None:
    body = json.dumps(ASK | {"stream": stream, "max_tokens": 20, "ignore_eos": True}).encode()
    async with connection_to_a_slow_model() as (cluster, reader, writer):
        writer.write(post("/v1/chat/completions", body, version))
        answer = await rest_of_answer(reader, writer)
        interim, _, rest = answer.partition(b"HTTP/1.1 200 OK")
        assert interim == (b"HTTP/1.1 100 Continue\r\n\r\n" if version == "1.1" else b"")
        assert (b'"finish_reason":"length"' in rest) and cluster.workers[0].counts["cancelled"] == 0


async def test_a_client_that_closes_the_whole_connection_still_cancels_its_request() -> None:
    engine = {"speed": 1, "step_ms": 20}
    async with Cluster(aggregated=1, executor="simulated", engine=engine) as cluster:
        sock = bind("127.0.0.1", 0, "--http-port")
        async with serving(cluster.apps[0].served, sock):
            _, writer = await asyncio.open_connection(*sock.getsockname())
            writer.write(
                post("/v1/chat/completions", json.dumps(ASK | {"max_tokens": 5000, "ignore_eos": True}).encode())
            )
            await until(lambda: cluster.workers[0].counts["accepted"] == 1)
            writer.close()
            await until(lambda: cluster.workers[0].counts["cancelled"] == 1)


@pytest.mark.parametrize("path", ["/health", "/live", "/version", "/metrics", "/v1/models", f"/v1/models/{MODEL}"])
async def test_head_is_answered_as_get_without_the_body(path: str) -> None:
    async with served() as (port, _), httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        got, head = await client.get(path), await client.head(path)
        assert (head.status_code, head.content) == (got.status_code, b"") and got.status_code == 200
        assert head.headers["content-type"] == got.headers["content-type"]


async def test_a_trailing_slash_is_served_and_not_redirected() -> None:
    async with served() as (port, _), httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        assert (await client.get("/v1/models/")).json()["data"][0]["id"] == MODEL
        assert (await client.post("/v1/chat/completions/", json=ASK | {"max_tokens": 1})).status_code == 200
        assert (await client.get("/nothing/")).status_code == 404


async def test_the_version_is_that_of_the_package() -> None:
    async with served() as (port, _), httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        assert (await client.get("/version")).json() == {"version": dynserve.__version__}


async def test_an_idle_connection_is_kept_for_75_seconds_or_the_configured_time() -> None:
    kept: list[float] = []

    class Recording(uvicorn.Config):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            kept.append(options["timeout_keep_alive"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uvicorn, "Config", Recording)
        async with served():
            assert kept == [75.0] and FrontendConfig().keep_alive_s == 75.0
    async with Cluster(aggregated=1, executor="simulated") as cluster:
        sock = bind("127.0.0.1", 0, "--http-port")
        async with serving(cluster.apps[0].served, sock, keep_alive_s=0.05):
            answer = await raw(sock.getsockname()[1], b"GET /live HTTP/1.1\r\nhost: localhost\r\n\r\n")
            assert b"200 OK" in answer  # and the server has closed the connection


async def test_connections_beyond_the_limit_of_open_files_get_a_503_and_a_log_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with served(HttpLimits(connections=2)) as (port, _):
        kept = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        for _, writer in kept:
            writer.write(b"GET /live HTTP/1.1\r\nhost: localhost\r\n\r\n")
        for reader, _ in kept:
            assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
        answer = await raw(port, b"GET /live HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert error_of(answer) == (503, "this server has too many open connections; try again soon")
        assert (
            "refusing connections: over 2 are open; the limit of open files (ulimit -n) allows no more" in caplog.text
        )
        for _, writer in kept:
            writer.close()
        await until(lambda: True)
        async with asyncio.timeout(10):
            while b"200 OK" not in await raw(
                port, b"GET /live HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
            ):
                await asyncio.sleep(0.01)


async def test_an_interim_response_never_stands_within_another_response() -> None:
    ask = json.dumps(ASK | {"stream": True, "max_tokens": 20, "ignore_eos": True}).encode()
    async with connection_to_a_slow_model() as (_, reader, writer):
        writer.write(post("/v1/chat/completions", ask) * 2)
        await reader.readuntil(b"data: ")  # the first answer is being written, the second request waits
        answer = await rest_of_answer(reader, writer)
    assert b"100 Continue" not in answer and answer.count(b"[DONE]") == 2
