"""The doctor's checks of the planned cluster: model, engine options, planes, ports."""

from __future__ import annotations

import logging
import os
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from dynserve.addresses import join_host_port, servers
from dynserve.config import WorkerConfig, check_plane_tls, nearest
from dynserve.doctor.finding import DoctorConfig, Finding
from dynserve.errors import ConfigError, DynserveError
from dynserve.executors.engine_args import engine_args
from dynserve.executors.option_names import ARGS
from dynserve.executors.trtllm import PIN
from dynserve.executors.trtllm.arguments import llm_arguments, resolved_backend
from dynserve.executors.trtllm.options import WITHOUT_EFFECT, Options, read_options
from dynserve.model_files import check_model_folder, read_model_files
from dynserve.plane_tls import plane_tls, server_tls

TIMEOUT = 2.0  # seconds
EXPIRES_SOON = 30  # days


def model(config: DoctorConfig) -> Iterator[Finding]:
    if config.worker_role is None:
        return  # a frontend needs no model folder
    folder = Path(config.model_path)
    try:
        check_model_folder(folder)
        from dynserve.text.preprocess import Preprocessor

        preprocessor = Preprocessor(read_model_files(folder))
    except (DynserveError, ValueError) as error:
        yield Finding("model", "fail", str(error), "give --model-path a Hugging Face folder on this machine")
        return
    weights = list(folder.glob("*.safetensors"))
    if not weights and config.engine != "simulated":
        yield Finding("model", "fail", f"{folder} has no *.safetensors files", "download the weights, too")
        return
    size = sum(file.stat().st_size for file in weights) / 1e9
    vocabulary = preprocessor.tokenizer.get_vocab_size()
    yield Finding("model", "ok", f"{folder.resolve().name}: {size:.2g} GB of weights, {vocabulary:,} tokens")


def options(config: DoctorConfig) -> Iterator[Finding]:
    role = config.worker_role
    if role is None:
        return
    try:
        made = WorkerConfig(
            model_path=config.model_path,
            disaggregation_mode=role,
            executor=config.engine,
            extra_engine_args=config.extra_engine_args,
            override_engine_args=config.override_engine_args,
        )
        if config.engine != "trtllm":
            engine_args(made)
            yield Finding("engine options", "ok", f"fit a {role} worker")
            return
        with _CapturedWarnings() as captured:
            given = read_options(made)
            backend = (given.values.get("cache_transceiver_config") or {}).get("backend")
            llm_arguments(given, made, ARGS, PIN)
    except ConfigError as error:
        yield Finding("engine options", "fail", " ".join(str(error).split()))
        return
    for text in captured.lines:
        yield Finding("engine options", "warn", text)
    yield from _names(given)
    moves = f", KV caches move over {resolved_backend(backend, PIN)}" if backend else ""
    yield Finding("engine options", "ok", f"fit a {role} worker{moves}")


def backend_of(config: DoctorConfig) -> str | None:
    """Returns the transceiver's backend, or None when the engine options cannot be read; `options` reports why."""
    made = WorkerConfig(
        model_path=config.model_path,
        extra_engine_args=config.extra_engine_args,
        override_engine_args=config.override_engine_args,
    )
    try:
        with _CapturedWarnings():
            given = read_options(made)
    except ConfigError:
        return None
    return (given.values.get("cache_transceiver_config") or {}).get("backend")


def certificates(config: DoctorConfig) -> Iterator[Finding]:
    """Checks the certificate of the planes, if there is one."""
    try:
        check_plane_tls(config)
        tls = plane_tls(config)
    except ConfigError as error:
        yield Finding("plane TLS", "fail", str(error), "make all three files anew with plane-certificates.sh")
        return
    if tls is not None:
        days = int((tls.expires - time.time()) / 86400)
        soon = "renew it on all processes" if days < EXPIRES_SOON else ""
        yield Finding("plane TLS", "warn" if soon else "ok", f"the certificate is valid for {days} more days", soon)


def nats(config: DoctorConfig) -> Iterator[Finding]:
    for server in servers(config.nats_url, "--nats-url", 4222):
        shown = join_host_port(server.host, server.port)
        try:
            with socket.create_connection((server.host, server.port), TIMEOUT) as sock:
                greeting = sock.recv(4096)
        except OSError as error:
            yield _unreachable("NATS", shown, error, "NATS_URL")
            continue
        if greeting.startswith(b"INFO "):
            plain = server.scheme == "tls" and b'"tls_required":true' not in greeting
            yield (
                Finding("NATS", "fail", f"{shown} has no TLS", "say nats://") if plain else Finding("NATS", "ok", shown)
            )
        else:
            yield Finding("NATS", "fail", f"{shown} is not a NATS server", "check the port")


def etcd(config: DoctorConfig) -> Iterator[Finding]:
    try:
        secured = urllib.request.HTTPSHandler(context=server_tls(config))
    except ConfigError:
        return  # `certificates` reports it
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), secured)
    for server in servers(config.etcd_url, "--etcd-url", 2379):
        shown = join_host_port(server.host, server.port)
        scheme = "https" if server.scheme == "https" else "http"
        try:
            with opener.open(f"{scheme}://{shown}/version", timeout=TIMEOUT) as answer:
                body = answer.read(4096)
        except OSError as error:
            yield _unreachable("etcd", shown, error, "ETCD_URL")
            continue
        except (ValueError, EOFError) as error:
            yield Finding("etcd", "fail", f"{shown} does not speak HTTP: {error}", "check the port")
            continue
        if b"etcdserver" in body:
            yield Finding("etcd", "ok", shown)
        else:
            yield Finding("etcd", "fail", f"{shown} is not an etcd server", "check the port")


def ports(config: DoctorConfig) -> Iterator[Finding]:
    wanted = [("HTTP port", config.http_port, "--http-port")] if config.role in (None, "frontend") else []
    if config.worker_role is not None and config.system_port:
        wanted.append(("system port", config.system_port, "--system-port"))
    for name, port, flag in wanted:
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind(("127.0.0.1", port))
            except OSError as error:
                yield Finding(name, "fail", f"{port}: {error.strerror}", f"free it, or choose another with {flag}")
            else:
                yield Finding(name, "ok", f"{port} is free")


CLUSTER = (model, options, certificates, nats, etcd, ports)


def _names(given: Options) -> Iterator[Finding]:
    """Checks option names against the list of the pinned version. An installed package may have more, so an unknown key is
    a failure only below the top level."""
    for name, value in given.values.items():
        nested = ARGS.get(name)
        if name in WITHOUT_EFFECT:
            continue
        if name not in ARGS:
            hint = nearest(name, ARGS) or "; the worker checks it with the installed package"
            yield Finding(
                "engine options", "warn", f"{given.place(name)}: {name!r} is not a key of version {PIN}{hint}"
            )
        elif nested is not None and isinstance(value, dict):
            for key in value.keys() - nested.keys():
                where = given.place(name, key)
                text = f"{where}: unknown key {key!r} in {name}{nearest(key, nested)}"
                yield Finding("engine options", "fail", text)


def _unreachable(name: str, url: str, error: OSError, variable: str) -> Finding:
    """Reports a server that does not answer. Only a warning without `variable`, as `dynserve up` starts a server then."""
    reason = getattr(error, "reason", None) or error.strerror or error
    cure = f"start it, or set {variable}; `dynserve up` starts its own server"
    return Finding(name, "fail" if os.environ.get(variable) else "warn", f"{url} cannot be reached: {reason}", cure)


class _CapturedWarnings(logging.Handler):
    """Collects the warnings that are logged while options are read."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []
        self._log = logging.getLogger("dynserve.executors.trtllm")

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def __enter__(self) -> _CapturedWarnings:
        self._log.addHandler(self)
        self._propagated, self._log.propagate = self._log.propagate, False
        return self

    def __exit__(self, *exc: object) -> None:
        self._log.removeHandler(self)
        self._log.propagate = self._propagated
