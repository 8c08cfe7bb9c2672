from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

import dynserve.config
from dynserve.config import FrontendConfig, PlanesConfig, UpConfig, WorkerConfig, load
from dynserve.errors import ConfigError
from dynserve.frontend.frontend import router_options
from dynserve.routing.router import RouterOptions

PACKAGE = Path(dynserve.config.__file__).parent


def test_flags_win_over_environment_and_environment_over_file(tmp_path: Path) -> None:
    file = tmp_path / "f.yaml"
    file.write_text("http_port: 1\nlink_port: 1\nrouter_mode: random\n")
    environ = {"DYN_HTTP_PORT": "2", "DYN_LINK_PORT": "2"}
    config = load(FrontendConfig, "p", ["--config", str(file), "--http-port", "3"], environ)
    assert (config.http_port, config.link_port, config.router_mode) == (3, 2, "random")


def test_options_are_read_from_environment_variables() -> None:
    environ = {"DYN_ROUTER_MODE": "kv", "NATS_URL": "nats://n:1", "ETCD_URL": "http://e:2"}
    config = load(FrontendConfig, "p", [], environ)
    assert (config.router_mode, config.nats_url, config.etcd_url) == ("kv", "nats://n:1", "http://e:2")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model-pth", "x"], r"unknown option --model-pth \(did you mean --model-path\?\)"),
        (["--disaggregation-mode", "both"], "'both' is not one of prefill_and_decode, prefill, decode"),
        (["--max-batch-size", "many"], "--max-batch-size: 'many' does not fit"),
        (["--max-seq-len", "0"], "--max-seq-len must be greater than 0"),
        (["--system-port", "70000"], "--system-port must be between 0 and 65535"),
        (["--config", "/nowhere.yaml"], "--config /nowhere.yaml: No such file"),
    ],
)
def test_an_error_names_the_invalid_worker_option(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(WorkerConfig, "p", argv, {})


def test_an_error_names_the_unknown_key_of_a_configuration_file(tmp_path: Path) -> None:
    file = tmp_path / "f.yaml"
    file.write_text("http_prt: 1\n")
    with pytest.raises(ConfigError, match="unknown key 'http_prt' .did you mean http_port"):
        load(FrontendConfig, "p", ["--config", str(file)], {})


def test_prefill_without_decode_is_refused() -> None:
    with pytest.raises(ConfigError, match="come in pairs"):
        load(UpConfig, "p", ["--prefill", "1", "--decode", "0"], {})


def test_help_lists_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load(WorkerConfig, "p", ["--help"], {})
    text = capsys.readouterr().out
    assert "--disaggregation-mode" in text and "DYN_ROLE" in text


@pytest.mark.parametrize(("role", "page"), [(FrontendConfig, "frontend"), (WorkerConfig, "worker")])
def test_the_page_of_a_role_lists_every_option(role: type[PlanesConfig], page: str) -> None:
    rows = [row for row in (PACKAGE / page / "README.md").read_text().splitlines() if row.startswith("| `--")]
    listed = set(re.findall(r"--([a-z-]+)", " ".join(row.split("|")[1] for row in rows)))
    assert listed == {field.name.replace("_", "-") for field in dataclasses.fields(role)}


def test_a_frontend_configures_the_router_with_the_routers_own_defaults() -> None:
    assert router_options(FrontendConfig()) == RouterOptions()


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], False),
        (["--strict-fields"], True),
        (["--strict-fields", "true"], True),
        (["--strict-fields", "false"], False),
    ],
)
def test_a_boolean_flag_needs_no_value(argv: list[str], expected: bool) -> None:
    config = load(FrontendConfig, "x", [*argv, "--http-port", "1"], {})
    assert config.strict_fields is expected and config.http_port == 1


@pytest.mark.parametrize("role", [FrontendConfig, WorkerConfig, UpConfig])
@pytest.mark.parametrize("name", ["Team A", "a*", "a.b", "a/b", "ü", "", "x" * 65])
def test_a_namespace_with_a_meaning_in_subjects_or_keys_is_refused(role: Any, name: str) -> None:
    with pytest.raises(
        ConfigError, match=r"--namespace '.*' has other characters than letters, digits, - and _, or more"
    ):
        role(namespace=name)
    assert role(namespace="Team_A-1").namespace == "Team_A-1"
