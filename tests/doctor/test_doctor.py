"""The checks of the doctor on this machine and under simulated faults."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dynserve.doctor.cluster import CLUSTER
from dynserve.doctor.machine import MACHINE
from dynserve.doctor.report import DoctorConfig, Finding, findings
from dynserve.executors.trtllm import environment as env
from tests.certificates import Authority
from tests.conftest import DOUBLES

SMI = "NVIDIA H100 80GB HBM3, 81559, {free}, 580.65.06, 9.0"


def run(*flags: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dynserve", "doctor", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | environ)


def found(**config: Any) -> dict[str, Finding]:
    """Returns the findings by name, and the worst one where several share a name."""
    order = ("ok", "skip", "warn", "fail")
    every = list(findings(DoctorConfig(**config), [*MACHINE, *CLUSTER]))
    return {f.name: f for f in sorted(every, key=lambda f: order.index(f.state))}


def program(folder: Path, name: str, prints: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "text").write_bytes(prints.encode("latin-1"))
    script = folder / name
    script.write_text(f"#!/bin/sh\ncat {folder / 'text'}\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)


def test_the_doctor_finds_nothing_wrong_on_a_laptop(servers: tuple[str, str]) -> None:
    done = run("--etcd-url", servers[0], "--nats-url", servers[1], "--http-port", "0")
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    for name in ("python", "torch", "model", "engine options", "NATS", "etcd", "HTTP port"):
        assert any(line.startswith(f"ok    {name} ") for line in lines), name
    assert lines[-1].startswith("failures: 0, ")


def test_every_missing_part_of_a_trtllm_prefill_worker_is_reported() -> None:
    done = run(
        "--role",
        "prefill",
        "--executor",
        "trtllm",
        "--json",
        NATS_URL="nats://127.0.0.1:1",
        NIXL_PLUGINS_DIR="/nowhere",
    )
    assert done.returncode == 1
    report = json.loads(done.stdout)
    assert report["ok"] is False and report["role"] == "prefill" and report["executor"] == "trtllm"
    by_name = {finding["name"]: finding for finding in report["findings"]}
    for name in ("GPU", "TensorRT-LLM", "NIXL", "engine options", "NATS"):
        assert by_name[name]["state"] == "fail", name
    assert "cache_transceiver_config: backend: NIXL" in by_name["engine options"]["text"]
    assert "1.3.0rc29" in by_name["TensorRT-LLM"]["cure"]


def test_an_unknown_flag_exits_with_2_and_suggests_the_right_one() -> None:
    done = run("--rol", "prefill")
    assert done.returncode == 2 and "did you mean --role?" in done.stderr


def test_a_gpu_with_little_free_memory_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    program(tmp_path, "nvidia-smi", SMI.format(free=80000))
    assert found(executor="trtllm")["GPU"].state == "ok"
    program(tmp_path, "nvidia-smi", SMI.format(free=2000))
    gpu = found(executor="trtllm")["GPU"]
    assert gpu.state == "warn" and "2 of 80 GiB free" in gpu.text


def test_an_mpi_other_than_open_mpi_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    program(tmp_path, "mpirun", "HYDRA build details: MPICH 4.1")
    assert found(executor="trtllm")["MPI"].state == "fail"
    program(tmp_path, "mpirun", "mpirun (Open MPI) 5.0.7")
    assert found(executor="trtllm")["MPI"].state == "ok"


def test_a_library_name_that_breaks_triton_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path, "ldconfig", "\tlib\xc4.so => /opt/lib\xc4.so")
    monkeypatch.setattr(env, "LDCONFIG", str(tmp_path / "ldconfig"))
    monkeypatch.delenv("TRITON_LIBCUDA_PATH", raising=False)
    triton = found(executor="trtllm")["Triton"]
    assert triton.state == "fail" and "lib\\xc4.so" in triton.text and "TRITON_LIBCUDA_PATH" in triton.cure
    monkeypatch.setenv("TRITON_LIBCUDA_PATH", str(tmp_path))
    assert found(executor="trtllm")["Triton"].state == "ok"


def test_nixl_and_ucx_are_checked_for_a_backend_that_uses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOUBLES))
    transceiver = json.dumps({"cache_transceiver_config": {"backend": "NIXL"}})
    config = {"executor": "trtllm", "role": "prefill", "override_engine_args": transceiver}
    monkeypatch.setenv("NIXL_PLUGINS_DIR", str(DOUBLES / "tensorrt_llm" / "libs" / "nixl" / "plugins"))
    assert found(**config)["NIXL"].state == "ok"
    monkeypatch.setenv("NIXL_PLUGINS_DIR", "/nowhere")
    assert found(**config)["NIXL"].state == "fail"
    assert found(**config | {"override_engine_args": transceiver.replace("NIXL", "UCX")})["NIXL"].state == "skip"
    monkeypatch.setenv("UCX_TLS", "tcp")
    assert found(**config)["UCX"].state == "warn"


def test_errors_in_an_engine_options_file_are_reported_with_their_line(tmp_path: Path) -> None:
    file = tmp_path / "engine.yaml"
    file.write_text(
        "cache_transceiver_config:\n  backend: NIXL\n  max_tokens_in_buffer: 16\nkv_cache_config:\n  dtipe: fp8\n"
    )
    done = run("--role", "decode", "--executor", "trtllm", "--extra-engine-args", str(file))
    assert f"warn  engine options   {file}:3: max_tokens_in_buffer: 16 is below max_seq_len" in done.stdout
    assert (
        f"fail  engine options   {file}:5: unknown key 'dtipe' in kv_cache_config (did you mean dtype?)" in done.stdout
    )
    assert "Traceback" not in done.stdout + done.stderr


def test_a_folder_that_is_not_a_model_is_reported(tmp_path: Path) -> None:
    assert found(model_path=str(tmp_path))["model"].text.endswith("has no config.json in it")


def test_certificates_and_servers_with_tls_are_checked(
    authority: Authority, secured: tuple[str, str], servers: tuple[str, str], tmp_path: Path
) -> None:
    files = {"certificate": authority.certificate, "key": authority.key, "ca": authority.ca}
    given = {f"plane_tls_{name}": path for name, path in files.items()}
    report = found(role="frontend", http_port=0, etcd_url=secured[0], nats_url=secured[1], **given)
    assert [report[name].state for name in ("plane TLS", "NATS", "etcd")] == ["ok", "ok", "ok"]
    without = found(role="frontend", http_port=0, etcd_url=secured[0], nats_url=servers[1].replace("nats:", "tls:"))
    assert "plane TLS" not in without and without["etcd"].state in ("warn", "fail")
    assert without["NATS"].state == "fail" and "has no TLS" in without["NATS"].text
    half = found(role="frontend", http_port=0, plane_tls_certificate=authority.certificate)
    assert half["plane TLS"].state == "fail" and "need each other" in half["plane TLS"].text
    other = Authority(tmp_path)
    report = found(role="frontend", http_port=0, **(given | {"plane_tls_ca": other.ca}))
    assert report["plane TLS"].state == "fail" and "verify failed" in report["plane TLS"].text


def test_a_port_in_use_and_a_server_that_is_not_etcd_are_reported() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        sock.listen()
        report = found(role="frontend", http_port=port, etcd_url=f"http://127.0.0.1:{port}")
    assert report["HTTP port"].state == "fail" and "--http-port" in report["HTTP port"].cure
    assert report["etcd"].state in ("warn", "fail")


def test_a_check_that_raises_becomes_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(config: DoctorConfig) -> Any:
        raise PermissionError("no /proc here")

    (finding,) = findings(DoctorConfig(), [broken])
    assert (finding.state, finding.name) == ("warn", "broken") and "no /proc here" in finding.text
