"""Images and containers by buildah and podman, with storage of their own that is removed at the end.

Written for machines without a container daemon, systemd or a registry: the base image is made of Debian's packages by
mmdebstrap, and the host's settings of pip apply within the build.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dynserve.deploy.render_command import as_yaml

ROOT = Path(__file__).parent.parent.parent
TOOLS = ("buildah", "podman", "mmdebstrap", "iptables")
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
NETWORK = "dynserve"


def missing() -> str:
    """Returns the reason why images cannot be built here; empty if they can."""
    lacking = [name for name in TOOLS if shutil.which(name) is None]
    if lacking:
        return f"{', '.join(lacking)} not installed"
    return "" if os.geteuid() == 0 else "only root can build and run images here"


class Podman:
    """One private storage of images and containers, below `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._storage = ["--root", str(folder / "storage"), "--runroot", str(folder / "run")]
        self._environment = os.environ | {"CONTAINERS_CONF": str(self._containers_conf())}

    def _containers_conf(self) -> Path:
        """Limits that this user may set, and a runtime that needs neither systemd nor unified control groups."""
        limits = []
        for name, (kind, wanted) in LIMITS.items():
            hard = resource.getrlimit(kind)[1]
            limit = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
            limits.append(f"{name}={limit}:{limit}")
        path = self._folder / "containers.conf"
        runtime = 'runtime = "runc"\n' if shutil.which("runc") else ""
        text = f'[containers]\ndefault_ulimits = {json.dumps(limits)}\n[engine]\n{runtime}cgroup_manager = "cgroupfs"\n'
        path.write_text(text)
        return path

    def run(
        self, *words: str | Path, tool: str = "podman", check: bool = True, timeout: float = 120, errors: bool = False
    ) -> str:
        """Runs a command and returns its output. Raises AssertionError with its errors."""
        command = [tool, *self._storage, *map(str, words)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, check=False, env=self._environment
        )
        if check:
            assert done.returncode == 0, f"{' '.join(map(str, words))}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        return (done.stdout + (done.stderr if errors else "")).strip()

    def wrapper(self) -> str:
        """Returns a script that is podman with this storage."""
        settings = f"CONTAINERS_CONF={self._environment['CONTAINERS_CONF']}"
        return f'#!/bin/sh\nexec env {settings} {shutil.which("podman")} {" ".join(self._storage)} "$@"\n'

    def make_base(self) -> str:
        """Makes the base image, and returns its name."""
        name = "localhost/dynserve-base"
        if self.run("images", "--quiet", name, check=False):
            return name
        archive = self._folder / "base.tar"
        packages = "python3,python3-venv,ca-certificates"
        command = ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={packages}", "bookworm", str(archive)]
        subprocess.run(command, check=True, timeout=300)
        self.run("import", "--quiet", archive, name)
        archive.unlink()
        return name

    def build(self, target: str, base: str) -> str:
        """Builds one target of the Dockerfile, and returns the image's name."""
        name = f"localhost/dynserve:{target}"
        mounts = [word for path in self._pip_settings() for word in ("-v", f"{path[0]}:{path[1]}:ro")]
        # the docker format: the OCI one has no HEALTHCHECK
        words = [
            "bud",
            "--format",
            "docker",
            "--isolation",
            "chroot",
            "--network",
            "host",
            "--layers",
            "--target",
            target,
            "--tag",
            name,
        ]
        words += ["--file", "docker/Dockerfile", "--ignorefile", "docker/Dockerfile.dockerignore"]
        words += ["--build-arg", f"BASE={base}", "--build-arg", f"TORCH_INDEX={TORCH_INDEX if _reachable() else ''}"]
        self.run(*words, *mounts, str(ROOT), tool="buildah", timeout=900)
        return name

    def _pip_settings(self) -> list[tuple[str, str]]:
        """Returns the folders and files of the host that pip needs within the build, and where they are mounted."""
        listed = subprocess.run(["pip", "config", "list"], capture_output=True, text=True, check=False).stdout
        settings: dict[str, str] = {}
        for line in listed.splitlines():
            key, _, value = line.partition("=")
            settings[key.rpartition(".")[2]] = value.strip("'\"")
        kept = {key: settings[key] for key in ("cert", "find-links", "index-url", "extra-index-url") if key in settings}
        path = self._folder / "pip.conf"
        path.write_text("[global]\n" + "".join(f"{key} = {value}\n" for key, value in kept.items()))
        found = {"/etc/ssl/certs"} if Path("/etc/ssl/certs").is_dir() else set()
        for word in " ".join(kept.values()).split():
            # the packages of an index lie beside it
            local = Path(urlsplit(word).path).parent if word.startswith("file:") else Path(word)
            if local.is_dir() and local.is_absolute():
                found.add(str(local))
        return [(str(path), "/etc/pip.conf"), *((one, one) for one in sorted(found))]

    # containers

    @contextmanager
    def network(self) -> Iterator[None]:
        self.run("network", "create", NETWORK, check=False)
        try:
            yield
        finally:
            self.run("network", "rm", "--force", NETWORK, check=False)

    def play(self, objects: list[dict[str, Any]]) -> None:
        """Starts pods, as `kubectl apply` would."""
        path = self._folder / "play.yaml"
        path.write_text("---\n".join(as_yaml(one) for one in objects))
        self.run("kube", "play", "--network", NETWORK, path)

    def address(self, pod: str) -> str:
        infra = json.loads(self.run("pod", "inspect", pod))["InfraContainerID"]
        networks: Mapping[str, Any] = json.loads(self.run("inspect", infra))[0]["NetworkSettings"]["Networks"]
        return str(networks[NETWORK]["IPAddress"])

    def logs(self) -> str:
        """Returns the last lines of all containers."""
        names = self.run("ps", "--all", "--format", "{{.Names}}").split()
        return "\n".join(
            f"--- {name}\n{self.run('logs', '--tail', '15', name, check=False, errors=True)}" for name in names
        )

    def reset(self, *, keep_images: bool) -> None:
        """Removes all containers, and unless they are kept, all images and the storage."""
        self.run("pod", "rm", "--all", "--force", "--time", "1", check=False)
        self.run("rm", "--all", "--force", "--time", "1", check=False)
        if keep_images:
            return
        self.run("system", "reset", "--force", check=False)
        with contextlib.suppress(OSError):
            subprocess.run(["umount", str(self._folder / "storage" / "overlay")], capture_output=True, check=False)
        shutil.rmtree(self._folder, ignore_errors=True)


LIMITS = {"nofile": (resource.RLIMIT_NOFILE, 20_000), "nproc": (resource.RLIMIT_NPROC, 4096)}


def _reachable() -> bool:
    """Whether PyTorch's own index answers; otherwise pip would try it for minutes."""
    try:
        socket.create_connection((urlsplit(TORCH_INDEX).hostname or "", 443), 3).close()
    except OSError:
        return False
    return True
