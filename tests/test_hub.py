"""Models by their Hugging Face id, against a server that speaks the Hub's protocol."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from dynserve.config import TINY_MODEL
from dynserve.hub import is_id, model_name_of
from tests.conftest import Deployment

FILES = {path.name: path.read_bytes() for path in TINY_MODEL.iterdir() if path.is_file()} | {
    "pytorch_model.bin": b"unused", "original/params.json": b"{}", "README.md": b"text",
}  # fmt: skip
SHA = "a" * 40
WHOLE = sorted(name for name in FILES if name.endswith((".json", ".safetensors", ".jinja")) and "/" not in name)
LOAD = "import sys; from dynserve.hub import model_folder; print(model_folder(sys.argv[1], weights=len(sys.argv) < 3))"


class Hub:
    """The models org/model (open), org/gated and org/private; the last needs the token `secret`."""

    def __init__(self) -> None:
        self.downloads: Counter[str] = Counter()
        self.url = ""


@pytest.fixture
def hub() -> Iterator[Hub]:
    made = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            parts = self.path.partition("?")[0].strip("/").split("/")
            info = parts[:2] == ["api", "models"]
            repository, rest = "/".join(parts[2:4] if info else parts[:2]), parts[4:] if info else parts[2:]
            allowed = self.headers.get("authorization") == "Bearer secret"
            if repository == "org/gated":
                self.send(403, b"", {"X-Error-Code": "GatedRepo"})
            elif repository not in ("org/model", "org/private") or (repository == "org/private" and not allowed):
                self.send(401, b"", {"X-Error-Code": "RepoNotFound"})
            elif info and rest[0] == "revision":
                found = rest[1] in ("main", "v1", SHA)
                body = json.dumps({"id": repository, "sha": SHA, "siblings": [{"rfilename": name} for name in FILES]})
                self.send(200 if found else 404, body.encode(), {} if found else {"X-Error-Code": "RevisionNotFound"})
            elif info and rest[0] == "tree":
                entries = [
                    {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for name, content in FILES.items()
                ]
                self.send(200, json.dumps(entries).encode())
            else:
                content = FILES["/".join(rest[2:])]
                if self.command == "GET":
                    made.downloads[rest[-1]] += 1
                self.send(200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": SHA})

        def send(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(code)
            for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield made
    server.shutdown()
    thread.join()
    server.server_close()


def environment(hub: Hub, cache: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return kept | {"HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"} | more


def load(name: str, env: dict[str, str], *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LOAD, name, *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=env)


def names(folder: str) -> list[str]:
    return sorted(path.name for path in Path(folder.strip()).iterdir())


def test_a_model_is_downloaded_once_without_the_files_that_nothing_reads(hub: Hub, tmp_path: Path) -> None:
    env = environment(hub, tmp_path)
    first = load("org/model", env)
    assert first.returncode == 0 and names(first.stdout) == WHOLE, first.stderr
    assert (Path(first.stdout.strip()) / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    before = hub.downloads.copy()
    assert set(before.values()) == {1}
    again = load("org/model", env | {"HF_ENDPOINT": "http://127.0.0.1:1"})  # the cache is enough
    assert again.stdout == first.stdout and hub.downloads == before


def test_the_weights_are_not_downloaded_where_nothing_computes_with_them(hub: Hub, tmp_path: Path) -> None:
    env = environment(hub, tmp_path)
    assert "model.safetensors" not in names(load("org/model", env, "small").stdout)
    assert names(load("org/model@v1", env).stdout) == WHOLE  # a worker of another executor needs them later
    assert hub.downloads["config.json"] == 1


def test_two_workers_that_start_at_once_download_each_file_once(hub: Hub, tmp_path: Path) -> None:
    env = environment(hub, tmp_path)
    command = [sys.executable, "-c", LOAD, "org/model"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in both]
    assert outputs[0] == outputs[1] and names(outputs[0]) == WHOLE
    assert set(hub.downloads.values()) == {1}


@pytest.mark.parametrize(
    ("name", "more", "sentence"),
    [
        ("org/none", {}, "there is no such model, or it is private and HF_TOKEN is not set"),
        ("org/private", {"HF_TOKEN": "wrong"}, "there is no such model, or it is private"),
        ("org/gated", {}, "access is restricted: accept its terms"),
        ("org/model@v9", {}, "it has no revision 'v9'"),
        ("org/model", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE forbids a download"),
        ("org/model", {"HF_ENDPOINT": "http://127.0.0.1:1"}, "the hub cannot be reached"),
        ("org/a..b", {}, "not an id of Hugging Face"),
    ],
)
def test_each_reason_is_one_sentence(hub: Hub, tmp_path: Path, name: str, more: dict[str, str], sentence: str) -> None:
    done = load(name, environment(hub, tmp_path, **more))
    assert done.returncode == 1 and f"ConfigError: --model-path {name}: " in done.stderr and sentence in done.stderr
    assert hub.downloads == {}


def test_a_token_gives_access(hub: Hub, tmp_path: Path) -> None:
    assert load("org/private", environment(hub, tmp_path, HF_TOKEN="secret")).returncode == 0


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    code = (
        "import errno, huggingface_hub\n"
        "from huggingface_hub.errors import LocalEntryNotFoundError\n"
        "def full(**how):\n"
        "    raise LocalEntryNotFoundError('x') if how.get('local_files_only') else OSError(errno.ENOSPC, 'No space')\n"
        "huggingface_hub.snapshot_download = full\n"
    )
    done = subprocess.run([sys.executable, "-c", code + LOAD, "org/model"], capture_output=True, text=True, check=False)
    assert "there is no room for it on the disk of the cache" in done.stderr


def test_ids_are_told_from_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_id("org/model") and is_id("org/model@v1.2") and model_name_of("org/model@v1.2") == "org/model"
    assert not is_id("model") and not is_id("/models/a") and not is_id("a/b/c") and not is_id("../x")
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert not is_id("org/model")


def test_a_worker_serves_a_model_under_its_id(deploy: object, hub: Hub, tmp_path: Path) -> None:
    deployment: Deployment = deploy()  # type: ignore[operator]
    deployment.env = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
    }
    deployment.frontend()
    deployment.worker("prefill_and_decode", "--model-path", "org/model@v1", "--executor", "simulated")
    deployment.wait_for(1)
    assert deployment.health()["models"] == ["org/model"]
    assert "model.safetensors" not in hub.downloads
    deployment.stop()
