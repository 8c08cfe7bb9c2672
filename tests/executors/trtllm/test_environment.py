"""Environment variables that are set before the import, and faults that are recognised before they cause a crash."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import pytest

from dynserve.errors import ConfigError
from dynserve.executors.trtllm import api
from dynserve.executors.trtllm import environment as env

# a library of this name, in Latin-1, is what stops Triton
LISTED = b"1 libs found in cache `/etc/ld.so.cache'\n\tlib\xc4.so (libc6,x86-64) => /opt/lib\xc4.so\n"


@pytest.fixture
def ldconfig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An ldconfig whose output is not UTF-8. Neither its output nor a usual folder contains libcuda."""
    listing = tmp_path / "listing"
    listing.write_bytes(LISTED)
    script = tmp_path / "ldconfig"
    script.write_text(f"#!/bin/sh\ncat {listing}\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(env, "LDCONFIG", str(script))
    monkeypatch.setenv("TRTLLM_DOUBLE_LDCONFIG", str(script))
    return script


def with_libcuda(folder: Path) -> str:
    folder.mkdir()
    (folder / env.LIBCUDA).touch()
    return str(folder)


def test_tritons_library_path_is_set_so_that_it_does_not_run_ldconfig(
    ldconfig: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trtllm_double: None
) -> None:
    with pytest.raises(UnicodeDecodeError):
        __import__("tensorrt_llm")  # the crash without the variable
    sys.modules.pop("tensorrt_llm", None)
    monkeypatch.setenv("LD_LIBRARY_PATH", with_libcuda(tmp_path / "driver"))
    env.prepare(os.environ, "some/model")
    assert os.environ["TRITON_LIBCUDA_PATH"] == str(tmp_path / "driver")
    assert api.import_api().version


def test_without_libcuda_the_import_error_names_the_variable_to_set(ldconfig: Path, trtllm_double: None) -> None:
    with pytest.raises(ConfigError, match=r"Triton cannot read .* lib\\xc4.so .*set TRITON_LIBCUDA_PATH"):
        api.import_api()


def test_ldconfig_is_read_as_bytes(tmp_path: Path, ldconfig: Path) -> None:
    (tmp_path / "listing").write_bytes(LISTED + b"\tlibcuda.so.1 (libc6,x86-64) => /drivers/libcuda.so.1\n")
    assert env.run_ldconfig(str(ldconfig)) == (["/drivers"], "lib\\xc4.so (libc6,x86-64) => /opt/lib\\xc4.so")
    assert env.run_ldconfig("/nowhere/ldconfig") == ([], "")


def test_variables_that_are_already_set_are_not_changed(tmp_path: Path) -> None:
    environ = {"TRITON_LIBCUDA_PATH": "/mine", "LC_ALL": "de_DE.UTF-8", "HF_HUB_OFFLINE": "0"}
    env.prepare(environ, str(tmp_path))
    assert environ == {"TRITON_LIBCUDA_PATH": "/mine", "LC_ALL": "de_DE.UTF-8", "HF_HUB_OFFLINE": "0"}


def test_the_locale_becomes_utf8_and_a_local_model_sets_hf_hub_offline(tmp_path: Path) -> None:
    environ = {"LANG": "C", "TRITON_LIBCUDA_PATH": "/x"}
    env.prepare(environ, str(tmp_path))
    assert environ["LC_ALL"] == "C.UTF-8" and environ["HF_HUB_OFFLINE"] == "1"
    environ = {"LANG": "C.UTF-8", "TRITON_LIBCUDA_PATH": "/x"}
    env.prepare(environ, "org/model")
    assert environ == {"LANG": "C.UTF-8", "TRITON_LIBCUDA_PATH": "/x"}


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"UCX_TLS": "tcp"}, "UCX_TLS=tcp excludes CUDA memory"),
        ({"UCX_TLS": "tcp,cuda_copy"}, None),
        ({"UCX_TLS": "^cuda_ipc"}, None),
        ({"NIXL_BACKEND": "UCX", "TRTLLM_NIXL_KVCACHE_BACKEND": "LIBFABRIC"}, "keep only the second"),
    ],
)
def test_variables_that_break_transfers_cause_a_warning(environ: dict[str, str], message: str | None) -> None:
    found = env.warnings(environ)
    assert bool(found) == (message is not None)
    assert message is None or message in found[0]


@pytest.mark.parametrize("name", ["NIXL_PLUGIN_DIR", "NIXL_PLUGINS_DIR"])
def test_a_folder_without_nixl_plugins_is_recognised(tmp_path: Path, name: str) -> None:
    environ = {name: str(tmp_path)}
    with pytest.raises(ConfigError, match=rf"{name}=.* holds no libplugin_\*.so"):
        env.check_nixl(environ)
    (tmp_path / "libplugin_UCX.so").touch()
    env.check_nixl(environ)
    assert environ == {"NIXL_PLUGIN_DIR": str(tmp_path), "NIXL_PLUGINS_DIR": str(tmp_path)}


def test_two_folders_of_nixl_plugins_are_an_error() -> None:
    with pytest.raises(ConfigError, match=r"NIXL_PLUGIN_DIR=/a and NIXL_PLUGINS_DIR=/b differ"):
        env.check_nixl({"NIXL_PLUGIN_DIR": "/a", "NIXL_PLUGINS_DIR": "/b"})


def test_a_slim_image_without_nixl_plugins_is_recognised(monkeypatch: pytest.MonkeyPatch, trtllm_double: None) -> None:
    env.check_nixl({})  # the package brings them
    monkeypatch.setattr(env, "nixl_plugin_folders", list)
    with pytest.raises(ConfigError, match="looks like a slim image"):
        env.check_nixl({})
