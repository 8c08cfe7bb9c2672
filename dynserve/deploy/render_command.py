"""`dynserve deploy render FILE`: prints a deployment's Kubernetes manifests, or writes each object to a file."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from dynserve.config import check_bounds, exit_with, load, option
from dynserve.deploy.cluster import Autoscaling, Server
from dynserve.deploy.documents import Notes
from dynserve.deploy.local import scale_of
from dynserve.deploy.objects import Object
from dynserve.deploy.plan import Overrides, load_folder, roles_of
from dynserve.deploy.reader import read_deployment
from dynserve.deploy.render import RenderOptions, options_of, render
from dynserve.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RenderConfig:
    """The options of `dynserve deploy render`."""

    output: str | None = option(
        None, "or -o: folder to write a file per object into; default: all to the standard output"
    )
    image: str | None = option(None, "image of all components, in place of the file's; it must have dynserve in it")
    executor: str | None = option(None, "DYN_EXECUTOR of the workers: torch, simulated or trtllm")
    scale: str | None = option(None, "replicas by component, as name=2,name=0")
    config_maps: str | None = option(
        None, "folder with the files of ConfigMaps that are not in FILE; default: FILE's own"
    )
    nats_url: str | None = option(None, "NATS; default: the file's, else a small one is rendered")
    etcd_url: str | None = option(None, "etcd; default: the file's, else a small one is rendered")
    pod_monitor: bool = option(False, "render a PodMonitor, for clusters with the Prometheus operator")
    max_replicas: str | None = option(
        None, "render an autoscaler of a component, up to so many replicas, as name=4,name=8"
    )
    keda_prometheus: str | None = option(
        None, "autoscalers of workers are KEDA's, which read this Prometheus; default: a metrics adapter is needed"
    )
    plane_tls_secret: str | None = option(None, "Secret with ca.crt, tls.crt and tls.key: mutual TLS between all pods")

    def __post_init__(self) -> None:
        check_bounds(self)


def manifests(path: str, config: RenderConfig, notes: Notes) -> list[Object]:
    """Returns the objects of the deployment in a file. Raises ConfigError."""
    graph, cluster = read_deployment(path, notes)
    load_folder(graph, Path(config.config_maps or Path(path).parent), Path(path))
    overrides = Overrides(executor=config.executor, scale=scale_of(config.scale))
    roles = roles_of(graph, overrides, notes, here=False)
    keda = Autoscaling(kind="keda", prometheus=config.keda_prometheus) if config.keda_prometheus else Autoscaling()
    options = RenderOptions(
        config.image, Server(url=config.nats_url or ""), Server(url=config.etcd_url or ""), config.executor,
        config.pod_monitor, max_replicas=scale_of(config.max_replicas, "--max-replicas"), autoscaling=keda,
        plane_tls_secret=config.plane_tls_secret or "",
    )  # fmt: skip
    if cluster is not None:
        options = options_of(cluster, options)
    unknown = options.max_replicas.keys() - {component.key for component in graph.components}
    if unknown:
        raise ConfigError(f"--max-replicas: {graph.name} has no component {min(unknown)!r}")
    return render(graph, roles, options, notes)


def write(objects: Sequence[Object], output: str | None) -> None:
    """Prints the objects, or writes each to `KIND-NAME.yaml`. Raises ConfigError if the folder cannot be written."""
    if output is None:
        print("---\n".join(as_yaml(one) for one in objects), end="")
        return
    try:
        folder = Path(output)
        folder.mkdir(parents=True, exist_ok=True)
        for one in objects:
            name = f"{one.get('kind', 'object')}-{(one.get('metadata') or {}).get('name', 'unnamed')}.yaml".lower()
            (folder / name.replace("/", "-")).write_text(as_yaml(one))
    except OSError as error:
        raise ConfigError(f"--output {output}: {error.strerror}") from error


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as blocks, and equal values twice instead of as an anchor."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    style = "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)


def as_yaml(one: Object) -> str:
    return str(yaml.dump(one, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120))


def main(argv: Sequence[str]) -> None:
    path, arguments = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("", argv)
    notes = Notes()
    try:
        words = ["--output" if word == "-o" else word for word in arguments]
        config = load(RenderConfig, "dynserve deploy render FILE", words)
        if not path:
            raise ConfigError("deploy render needs a FILE: dynserve deploy render FILE [options]")
        write(manifests(path, config, notes), config.output)
    except ConfigError as error:
        exit_with(error)
    for line in notes.lines:
        print(f"note: {line}", file=sys.stderr)
