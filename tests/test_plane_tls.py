"""Mutual TLS on the planes: what a process without a certificate of the cluster gets, and clusters that have it."""

from __future__ import annotations

import asyncio
import datetime
import shutil
import ssl
import struct
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import trustme

from dynserve.addresses import host_port
from dynserve.config import FrontendConfig, PlanesConfig
from dynserve.errors import ConfigError, HandoffBroken, TimedOut, Unavailable
from dynserve.executors import connections
from dynserve.plane_tls import PlaneTls, server_tls
from dynserve.server import serving as serving_module
from dynserve.transport import link as link_module
from dynserve.transport.base import Change, Put
from dynserve.transport.etcd_registry import EtcdRegistry, etcd_credentials
from dynserve.transport.link import TcpLinks
from dynserve.transport.nats_bus import open_nats
from dynserve.transport.planes import open_planes
from dynserve.wire.link import Hello
from tests.certificates import Authority
from tests.conftest import MODEL, Deployment, until
from tests.executors.test_handoff import Side
from tests.transport.test_link import End


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """An authority that the cluster does not accept."""
    return Authority(tmp_path_factory.mktemp("other"))


def without_certificate() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def of(authority: Authority) -> ssl.SSLContext:
    """A client that accepts every server and has a certificate of this authority."""
    context = without_certificate()
    context.load_cert_chain(authority.certificate, authority.key)
    return context


async def received_from(address: str, context: ssl.SSLContext | None, sent: bytes) -> bytes:
    """Returns all bytes that a process gets that connects to this address and sends `sent`."""
    host, port = host_port(address, "address", 0)
    found = b""
    try:
        async with asyncio.timeout(10):
            reader, writer = await asyncio.open_connection(host, port, ssl=context)
            with closing(writer):
                writer.write(sent)
                while part := await reader.read(1 << 16):
                    found += part
    except (OSError, ssl.SSLError):
        pass
    return found


Outsider = Callable[[Authority], ssl.SSLContext | None]
OUTSIDERS: dict[str, Outsider] = {
    "plain": lambda _: None,
    "no certificate": lambda _: without_certificate(),
    "another authority": of,
}


@pytest.fixture(params=OUTSIDERS)
def outsider(request: pytest.FixtureRequest, other: Authority) -> ssl.SSLContext | None:
    return OUTSIDERS[request.param](other)


HELLO = msgspec.msgpack.encode([Hello("w", 1)])


# links


async def test_a_link_without_a_certificate_of_the_cluster_gets_nothing(
    authority: Authority, outsider: ssl.SSLContext | None
) -> None:
    frontend = End()
    async with TcpLinks(tls=authority.tls).listen("127.0.0.1", 0, frontend.accept) as address:
        found = await received_from(address, outsider, struct.pack("<I", len(HELLO)) + HELLO)
        if outsider is None:  # the alert of the TLS server
            assert len(found) <= 7
        else:
            assert found == b""
        assert frontend.links == []


async def test_both_sides_of_a_link_are_checked(authority: Authority, tmp_path: Path) -> None:
    frontend, worker = End(), End()
    pretender = Authority(tmp_path).tls  # it would accept the worker
    pretender.server.load_verify_locations(authority.ca)
    async with TcpLinks(tls=pretender).listen("127.0.0.1", 0, frontend.accept) as address:
        with pytest.raises(Unavailable, match="certificate verify failed"):
            await TcpLinks(tls=authority.tls).dial(address, worker)
    assert frontend.links == []


@pytest.mark.parametrize("secured", ["listening side", "dialing side"])
async def test_a_link_with_tls_on_one_side_only_says_which_option_is_missing(
    authority: Authority, secured: str
) -> None:
    listening, dialing = TcpLinks(), TcpLinks(tls=authority.tls)
    if secured == "listening side":
        listening, dialing = dialing, listening
    async with listening.listen("127.0.0.1", 0, End().accept) as address:
        with pytest.raises(Unavailable, match="set --plane-tls-certificate on all or none"):
            await dialing.dial(address, End())


async def test_unfinished_handshakes_are_bounded(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "MAX_UNGREETED", 5)
    frontend, links = End(), TcpLinks(tls=authority.tls)
    async with links.listen("127.0.0.1", 0, frontend.accept) as address:
        host, port = host_port(address, "address", 0)
        opened = [await asyncio.open_connection(host, port) for _ in range(12)]
        for reader, _ in opened[:7]:  # the oldest are closed without a byte
            assert await asyncio.wait_for(reader.read(), 2) == b""
        worker = End()
        link = await links.dial(address, worker)
        link.send(Hello("w", 1))
        await until(lambda: frontend.bursts == [[Hello("w", 1)]])
        link.close()
        for _, writer in opened:
            writer.close()


async def test_a_handshake_that_is_not_finished_in_time_is_closed(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "HANDSHAKE_TIMEOUT", 0.1)
    async with TcpLinks(tls=authority.tls).listen("127.0.0.1", 0, End().accept) as address:
        assert await received_from(address, None, b"\x16") == b""


# KV transfers


async def test_a_fetch_without_a_certificate_of_the_cluster_gets_no_block(
    authority: Authority, outsider: ssl.SSLContext | None
) -> None:
    prefill = Side("p", 1)
    async with connections_of(prefill, authority.tls) as address:
        handoff = prefill.offer([4])
        layout = prefill.store.layout
        fetch = msgspec.msgpack.encode([handoff.id, handoff.request_id, handoff.sequence_hash, layout, 0, 1, {}])
        found = await received_from(address, outsider, struct.pack("<I", len(fetch)) + fetch)
        assert len(found) <= 7  # at most a TLS alert
        assert prefill.released == []


@asynccontextmanager
async def connections_of(side: Side, tls: PlaneTls | None) -> AsyncIterator[str]:
    from dynserve.executors.transceiver import TcpTransceivers

    async with TcpTransceivers(tls=tls).open(side.table, side.store, "127.0.0.1") as side.transceiver:
        yield msgspec.msgpack.decode(side.transceiver.state())[0]


async def test_a_fetch_with_tls_on_one_side_only_is_broken_and_says_why(authority: Authority) -> None:
    prefill, decode = Side("p", 1), Side("d", 0)
    async with connections_of(prefill, authority.tls), connections_of(decode, None):
        with pytest.raises(HandoffBroken, match="set --plane-tls-certificate on all or none"):
            await decode.transceiver.fetch(prefill.offer([4]), [0], 0)


async def test_blocks_larger_than_a_tls_record_arrive_unchanged(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "RECORDS", 10_000)
    prefill, decode = Side("p", 1), Side("d", 0)
    prefill.store.memory[:] = bytes(at * 7 % 251 for at in range(len(prefill.store.memory)))
    async with connections_of(prefill, authority.tls), connections_of(decode, authority.tls):
        for ticket in range(3):  # the second and third over the connection that was kept
            await decode.transceiver.fetch(prefill.offer([4, 2, 7], ticket=ticket), [1, 3, 5], 0)
    assert [decode.store.view(b) for b in (1, 3, 5)] == [prefill.store.view(b) for b in (4, 2, 7)]


# model files


async def test_a_frontend_with_tls_fetches_no_model_file_without_it(
    authority: Authority, servers: tuple[str, str]
) -> None:
    config = planes_config(authority, etcd_url=servers[0], nats_url=servers[1])
    async with open_planes(config, "test") as planes:
        with pytest.raises(Unavailable, match="has no mutual TLS: set --plane-tls-certificate on all or none"):
            await planes.fetch_file("http://127.0.0.1:1", "0" * 64)


async def test_unfinished_handshakes_of_an_https_server_are_bounded(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving_module, "MAX_HANDSHAKES", 5)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    sock = serving_module.bind("127.0.0.1", 0, "--port")
    port = sock.getsockname()[1]
    files = serving_module.Tls(authority.certificate, authority.key, client_ca=authority.ca)
    async with serving_module.serving(app, sock, tls=files):
        opened = [await asyncio.open_connection("127.0.0.1", port) for _ in range(12)]
        for reader, _ in opened[:7]:  # the oldest are closed without a byte
            assert await asyncio.wait_for(reader.read(), 2) == b""
        async with httpx.AsyncClient(verify=authority.tls.client, trust_env=False) as client:
            assert (await client.get(f"https://127.0.0.1:{port}/")).text == "ok"
        for _, writer in opened:
            writer.close()


# NATS and etcd


def planes_config(authority: Authority | None, **more: Any) -> PlanesConfig:
    if authority is None:
        return PlanesConfig(**more)
    return PlanesConfig(
        plane_tls_certificate=authority.certificate, plane_tls_key=authority.key, plane_tls_ca=authority.ca, **more
    )


async def test_a_registry_and_a_bus_reach_servers_that_ask_for_certificates(
    authority: Authority, secured: tuple[str, str]
) -> None:
    config, changes = planes_config(authority), list[Change]()
    registry = EtcdRegistry(secured[0], etcd_credentials(config))
    async with registry.watch("tls/", changes.append), registry.register("tls/a", b"1"):
        await until(lambda: changes == [Put("tls/a", b"1")], 10)
    async with open_nats(secured[1], "test", server_tls(config)) as bus:
        heard: list[bytes] = []
        async with bus.subscribe("s", heard.append):
            await bus.publish("s", b"x")
            await until(lambda: heard == [b"x"])


async def test_servers_that_ask_for_certificates_refuse_processes_of_another_authority(
    authority: Authority, other: Authority, secured: tuple[str, str]
) -> None:
    config = PlanesConfig(plane_tls_certificate=other.certificate, plane_tls_key=other.key, plane_tls_ca=authority.ca)
    changes: list[Change] = []
    registry = EtcdRegistry(secured[0], etcd_credentials(config))
    async with registry.watch("tls/", changes.append), registry.register("tls/b", b"1") as registration:
        await asyncio.sleep(1)
        assert not registration.registered.is_set() and changes == []
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1), open_nats(secured[1], "test", server_tls(config)):
            pass


async def test_a_bus_with_a_tls_address_does_not_speak_to_a_server_without_tls(
    authority: Authority, servers: tuple[str, str]
) -> None:
    url = servers[1].replace("nats:", "tls:")
    with pytest.raises((TimeoutError, TimedOut)):
        async with asyncio.timeout(1), open_nats(url, "test", server_tls(planes_config(authority))):
            pass


# whole clusters


async def test_a_cluster_with_tls_on_all_planes_answers_and_outsiders_get_nothing(
    deploy: Any, authority: Authority, secured: tuple[str, str], outsider: ssl.SSLContext | None
) -> None:
    deployment: Deployment = deploy(*secured)
    deployment.frontend(*authority.flags, "--local-prefill-tokens", "0")
    for role in ("prefill", "decode"):
        deployment.worker(role, *authority.flags)
    deployment.wait_for(2)
    body = {"model": MODEL, "prompt": "one, two, three,", "max_tokens": 4}
    answer = httpx.post(f"{deployment.base}/v1/completions", json=body, timeout=30, trust_env=False)
    assert answer.status_code == 200 and answer.json()["choices"][0]["text"].startswith(" four")
    async with httpx.AsyncClient(trust_env=False) as client:
        for instance in deployment.health()["instances"]:  # Kubernetes' probes have no certificate
            assert (await client.get(f"{instance['address']}/live")).status_code == 200
            assert (await client.get(f"{instance['address']}/files/0")).status_code == 404
    closed = {port for one in deployment.processes for port in listening_ports(one.pid)} - public_ports(deployment)
    assert len(closed) == 5  # the links of the frontend; KV transfers and model files of each worker
    for port in closed:
        found = await received_from(f"127.0.0.1:{port}", outsider, b"GET / HTTP/1.0\r\n\r\n")
        assert len(found) <= 7, (port, found)
    deployment.stop()


def listening_ports(pid: int) -> list[int]:
    import psutil

    found = psutil.Process(pid).net_connections(kind="tcp")
    return [one.laddr.port for one in found if one.status == psutil.CONN_LISTEN]


def public_ports(deployment: Deployment) -> set[int]:
    """The ports of the API and the workers' system servers."""
    systems = {host_port(one["address"], "address", 0)[1] for one in deployment.health()["instances"]}
    return systems | {deployment.port}


# configuration


def test_certificate_key_and_authority_need_each_other(authority: Authority) -> None:
    with pytest.raises(ConfigError, match="--plane-tls-certificate and --plane-tls-key need each other"):
        FrontendConfig(plane_tls_certificate=authority.certificate, plane_tls_ca=authority.ca)
    with pytest.raises(ConfigError, match="--plane-tls-certificate needs --plane-tls-ca"):
        FrontendConfig(plane_tls_certificate=authority.certificate, plane_tls_key=authority.key)
    FrontendConfig(plane_tls_ca=authority.ca)  # enough for servers that ask for no certificate


def test_files_that_cannot_be_used_are_errors_that_name_the_option(
    authority: Authority, other: Authority, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"--plane-tls-certificate .*missing\.crt"):
        PlaneTls(str(tmp_path / "missing.crt"), authority.key, authority.ca)
    with pytest.raises(ConfigError, match=r"--plane-tls-key .*missing\.key"):
        PlaneTls(authority.certificate, str(tmp_path / "missing.key"), authority.ca)
    with pytest.raises(ConfigError, match=r"--plane-tls-ca .*tls\.key"):
        PlaneTls(authority.certificate, authority.key, authority.key)
    with pytest.raises(ConfigError, match=r"--plane-tls-certificate .* and --plane-tls-key"):
        PlaneTls(authority.certificate, other.key, authority.ca)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_the_script_makes_certificates_that_the_planes_and_servers_accept(tmp_path: Path) -> None:
    script = Path(__file__).parent.parent / "docker" / "scripts" / "plane-certificates.sh"
    folder = tmp_path / "planes"
    made = subprocess.run([script, folder, "nats.example", "10.0.0.3"], check=False, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    tls = PlaneTls(*(str(folder / name) for name in ("tls.crt", "tls.key", "ca.crt")))
    for name, accepted in (("nats.example", True), ("10.0.0.3", True), ("localhost", True), ("other.example", False)):
        client = ssl.create_default_context(cafile=tls.ca)
        assert shakes_hands(tls.server, client, tls, name) is accepted, name
    assert (folder / "tls.key").stat().st_mode & 0o077 == 0
    again = subprocess.run([script, folder], check=False, capture_output=True, text=True)
    assert again.returncode == 1 and "exists" in again.stderr


def shakes_hands(server: ssl.SSLContext, client: ssl.SSLContext, tls: PlaneTls, name: str) -> bool:
    client.load_cert_chain(tls.certificate, tls.key)
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [client.wrap_bio(back, there, server_hostname=name), server.wrap_bio(there, back, server_side=True)]
    for _ in range(4):
        for side in sides:
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLCertVerificationError:
                return False
    return sides[1].version() == "TLSv1.3"


def test_a_certificate_that_no_peer_would_accept_is_an_error_at_once(
    authority: Authority, other: Authority, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"--plane-tls-certificate .* with --plane-tls-ca .*verify failed"):
        PlaneTls(other.certificate, other.key, authority.ca)
    ca = trustme.CA()
    expired = ca.issue_cert("localhost", not_after=datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC))
    ca.cert_pem.write_to_path(str(tmp_path / "ca.crt"))
    expired.private_key_pem.write_to_path(str(tmp_path / "tls.key"))
    expired.cert_chain_pems[0].write_to_path(str(tmp_path / "tls.crt"))
    with pytest.raises(ConfigError, match="certificate has expired"):
        PlaneTls(str(tmp_path / "tls.crt"), str(tmp_path / "tls.key"), str(tmp_path / "ca.crt"))
    assert authority.tls.expires > time.time()
