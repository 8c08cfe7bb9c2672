"""The processes that stand for a deployment's pods on this machine: their files, environment and commands.

Paths below a mount point are rewritten in arguments and in the environment, since a process has no root folder of its own.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from dynserve.addresses import servers
from dynserve.child import ChildSpec
from dynserve.deploy.commands import Command, find_command, without_triton_patch
from dynserve.deploy.documents import Map, Notes, Place
from dynserve.deploy.entry import PATH, adopt
from dynserve.deploy.flags import Translation, translate
from dynserve.deploy.graph import Component, Graph, merged_env
from dynserve.errors import ConfigError
from dynserve.hub import is_id

MAX_FOLDER_FILE = 1 << 20  # bytes; a ConfigMap of Kubernetes has no more
GRACE = 60.0  # seconds, where the pod has no terminationGracePeriodSeconds: the operator's default
_REFERENCE = re.compile(r"\$\((\w+)\)")


class Overrides(NamedTuple):
    """Settings of the command line that win over the file's."""

    model_path: str | None = None
    executor: str | None = None
    scale: Mapping[str, int] = {}  # component in lower case -> replicas


class Planes(NamedTuple):
    """The addresses of the servers that all processes use."""

    nats_url: str
    etcd_url: str


class Role(NamedTuple):
    """A component that runs here."""

    component: Component
    command: Command
    translation: Translation
    replicas: int

    @property
    def is_frontend(self) -> bool:
        return self.translation.role == "frontend"


def roles_of(graph: Graph, overrides: Overrides, notes: Notes, *, here: bool = True) -> list[Role]:
    """Returns the components that dynserve runs. `here`: as processes on this machine, not as pods.

    Raises:
        ConfigError: a component cannot run, a name in `scale` is unknown, or there is no frontend or no worker.
    """
    names = {component.key for component in graph.components}
    for name in overrides.scale:
        if name not in names:
            raise ConfigError(f"--scale: {graph.name} has no component {name!r}; it has {', '.join(sorted(names))}")
    found = [role for one in graph.components if (role := _role(graph, one, overrides, notes, here=here)) is not None]
    for missing in {"frontend", "worker"} - {role.translation.role for role in found}:
        raise ConfigError(f"{graph.place}: {graph.name} has no {missing}")
    return found


def _role(graph: Graph, component: Component, overrides: Overrides, notes: Notes, *, here: bool) -> Role | None:
    _remove_triton_patch(component, notes)
    words = _command_words(component)
    if component.type == "planner" or any("dynamo.planner" in word for word in words):
        notes.warn(component.place, f"{component.name} does not run: dynserve has no planner")
        return None
    if component.nodes > 1:
        what = f"there are no workers of {component.nodes} nodes; use one node, or more replicas"
        raise ConfigError(f"{component.place}: {component.name}: {what}")
    env = _plain_env(graph, component)
    if overrides.executor:
        env["DYN_EXECUTOR"] = overrides.executor
    if overrides.model_path:
        env["DYN_MODEL_PATH"] = overrides.model_path
    try:
        command = find_command(words, env)
        if command is None:
            raise ConfigError("its command runs neither a module of dynamo nor dynserve")
        translation = translate(command.module, command.arguments, env, here=here)
    except ConfigError as error:
        raise ConfigError(f"{_command_place(component)}: {component.name}: {error}") from error
    for note in translation.notes:
        notes.warn(_command_place(component), f"{component.name}: {note}")
    if here:
        _report_unused(component, notes)
    replicas = overrides.scale.get(component.key, component.replicas)
    return Role(component, command, translation, replicas)


def _remove_triton_patch(component: Component, notes: Notes) -> None:
    for key in ("command", "args"):
        given = component.main.get(key) or []
        words = [without_triton_patch(word) if isinstance(word, str) else word for word in given]
        if words != given:
            what = "its patch of Triton is left out: dynserve does not need it"
            notes.warn(Place(component.place.path, component.main.line_of(key)), f"{component.name}: {what}")
            component.main[key] = words


def _command_words(component: Component) -> list[str]:
    words = [str(word) for key in ("command", "args") for word in component.main.get(key) or []]
    return words or (["python3", "-m", "dynamo.frontend"] if component.type in ("frontend", "main") else [])


def _command_place(component: Component) -> Place:
    key = "args" if "args" in component.main else "command"
    return Place(component.place.path, component.main.line_of(key) or component.place.line)


def _report_unused(component: Component, notes: Notes) -> None:
    for key, what in (
        ("nodeSelector", "all processes run on this machine"),
        ("affinity", "all processes run on this machine"),
        ("initContainers", "containers of other images cannot run here"),
        ("resourceClaims", "GPUs are handed out by number"),
    ):
        if component.pod.get(key):
            place = Place(component.place.path, component.pod.line_of(key))
            notes.warn(place, f"{component.name}: {key} is ignored: {what}")
    if component.sidecars:
        notes.warn(
            component.place, f"{component.name}: its {len(component.sidecars)} sidecar containers do not run here"
        )
    if (component.main.get("lifecycle") or {}).get("preStop"):
        place = Place(component.place.path, component.main.line_of("lifecycle"))
        notes.warn(place, f"{component.name}: preStop does not run here: no load balancer has to notice the end")


# environment


def _plain_env(graph: Graph, component: Component) -> dict[str, str]:
    """Returns the entries that have a value in the file, for reading the command."""
    entries = merged_env(graph.env, component.env)
    return {str(entry.get("name")): str(entry["value"]) for entry in entries if entry.get("value") is not None}


def environment(graph: Graph, role: Role, pod: str) -> dict[str, str]:
    """Returns a pod's environment in the order of its entries, later ones with references to earlier ones.

    Raises:
        ConfigError: an entry refers to a ConfigMap, Secret or field that is not there.
    """
    component = role.component
    found: dict[str, str] = {}
    for source in _env_sources(component):
        found |= _whole_source(graph, component, source)
    for entry in merged_env(graph.env, component.env):
        value = _entry_value(graph, component, entry, pod)
        if value is not None:
            found[str(entry.get("name"))] = _REFERENCE.sub(lambda match: found.get(match[1], match[0]), value)
    return found


def _env_sources(component: Component) -> list[Map]:
    given = [source for source in component.main.get("envFrom") or [] if isinstance(source, Map)]
    for name in component.secrets:
        secret, reference = Map(component.place.line), Map(component.place.line)
        reference.update(name=name, optional=True)  # a token that a local model does not need
        secret["secretRef"] = reference
        given.append(secret)
    return given


def _whole_source(graph: Graph, component: Component, source: Map) -> dict[str, str]:
    for key, held, kind in (("configMapRef", graph.config_maps, "ConfigMap"), ("secretRef", graph.secrets, "Secret")):
        reference = source.get(key) or {}
        name = str(reference.get("name", ""))
        if not name:
            continue
        if name not in held:
            if reference.get("optional"):
                return {}
            raise ConfigError(f"{component.place}: {component.name}: envFrom: there is no {kind} {name!r} in the file")
        return {f"{source.get('prefix') or ''}{one}": value for one, value in held[name].items()}
    return {}


def _entry_value(graph: Graph, component: Component, entry: Map, pod: str) -> str | None:
    if entry.get("value") is not None:
        return str(entry["value"])
    source = entry.get("valueFrom") or {}
    for key, held in (("configMapKeyRef", graph.config_maps), ("secretKeyRef", graph.secrets)):
        if (reference := source.get(key)) is not None:
            name, item = str(reference.get("name", "")), str(reference.get("key", ""))
            if item in held.get(name, {}):
                return held[name][item]
            if reference.get("optional") or key == "secretKeyRef":  # secrets are rarely in the file
                return None
            place = Place(component.place.path, entry.line_of("valueFrom"))
            raise ConfigError(
                f"{place}: {component.name}: env {entry.get('name')}: no key {item!r} in ConfigMap {name!r}"
            )
    if (reference := source.get("fieldRef")) is not None:
        return _field(
            graph, component, str(reference.get("fieldPath", "")), pod, Place(component.place.path, entry.line)
        )
    if (reference := source.get("resourceFieldRef")) is not None:
        side, _, name = str(reference.get("resource", "")).partition(".")
        return component.resources.get(side, {}).get(name, "0")
    return ""


def _field(graph: Graph, component: Component, path: str, pod: str, place: Place) -> str:
    fields: dict[str, Callable[[], str]] = {
        "metadata.name": lambda: pod,
        "metadata.namespace": lambda: graph.namespace or "default",
        "metadata.uid": lambda: str(uuid.uuid5(uuid.NAMESPACE_DNS, pod)),
        "spec.nodeName": socket.gethostname,
        "spec.serviceAccountName": lambda: "default",
        "status.podIP": lambda: "127.0.0.1",
        "status.hostIP": lambda: "127.0.0.1",
    }
    if path in fields:
        return fields[path]()
    kind, _, key = path.rstrip("']").partition("['")
    labels = {"metadata.labels": component.labels | component.pod_labels}
    labels["metadata.annotations"] = component.annotations | component.pod_annotations
    if kind in labels:
        return labels[kind].get(key, "")
    raise ConfigError(f"{place}: {component.name}: there is no field {path!r} here")


def hub_models(graph: Graph, roles: Sequence[Role], overrides: Overrides) -> dict[str, bool]:
    """Returns the models that workers name by their Hugging Face ids, and whether they need the weights."""
    found: dict[str, bool] = {}
    for role in roles:
        if not role.is_frontend and role.replicas:
            env = _plain_env(graph, role.component)
            model = overrides.model_path or env.get("DYN_MODEL_PATH") or role.translation.value("--model-path") or ""
            executor = overrides.executor or env.get("DYN_EXECUTOR") or role.translation.value("--executor")
            if is_id(model):
                found[model] = found.get(model, False) or executor != "simulated"
    return found


# files


def load_folder(graph: Graph, folder: Path, own: Path) -> None:
    """Adds ConfigMaps that the deployment mounts but its file lacks: from a folder of their name in `folder`, else from the
    YAML files of `folder` itself, as `kubectl create configmap --from-file` makes them.

    Raises:
        ConfigError: there are no such files.
    """
    for component in graph.components:
        for name, place in _config_map_names(component):
            if name in graph.config_maps:
                continue
            inside = folder / name
            files = (
                sorted(inside.iterdir()) if inside.is_dir() else sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")])
            )
            found = {
                path.name: path.read_text()
                for path in files
                if path.is_file() and path.resolve() != own.resolve() and path.stat().st_size <= MAX_FOLDER_FILE
            }
            if not found:
                raise ConfigError(
                    f"{place}: ConfigMap {name!r} is not in the file, and {folder} has no files for it; use --config-maps"
                )
            graph.config_maps[name] = found


def _config_map_names(component: Component) -> list[tuple[str, Place]]:
    return [
        (str(source["name"]), Place(component.place.path, volume.line))
        for volume in component.pod.get("volumes") or []
        if isinstance(volume, Map) and (source := volume.get("configMap")) and source.get("name")
        and not source.get("optional")
    ]  # fmt: skip


def mounts(graph: Graph, component: Component, folder: Path) -> dict[str, str]:
    """Makes a component's volumes as folders below `folder`. Returns them by mount point."""
    volumes = {str(one.get("name")): one for one in component.pod.get("volumes") or [] if isinstance(one, Map)}
    found = {}
    for mount in component.main.get("volumeMounts") or []:
        volume = volumes.get(str(mount.get("name")))
        if volume is None:
            place = Place(component.place.path, mount.line)
            raise ConfigError(f"{place}: {component.name}: there is no volume {mount.get('name')!r}")
        where = _volume(graph, component, volume, folder)
        if sub := mount.get("subPath"):
            where /= str(sub)
        found[str(mount.get("mountPath", "")).rstrip("/") or "/"] = str(where)
    for point, claim in component.claims.items():
        found[point.rstrip("/")] = str(_made(folder / "claims" / claim))
    return found


def _volume(graph: Graph, component: Component, volume: Map, folder: Path) -> Path:
    name = str(volume.get("name"))
    if (host := volume.get("hostPath")) is not None:
        return Path(str(host.get("path", "/")))
    if (claim := volume.get("persistentVolumeClaim")) is not None:
        return _made(folder / "claims" / str(claim.get("claimName", name)))
    target = _made(folder / component.key / name)
    for kind, held, key in (("configMap", graph.config_maps, "name"), ("secret", graph.secrets, "secretName")):
        if (source := volume.get(kind)) is not None:
            items = {str(item.get("key")): str(item.get("path")) for item in source.get("items") or []}
            for file, content in held.get(str(source.get(key)), {}).items():
                if not items or file in items:
                    _write(target, items.get(file, file), content, private=kind == "secret")
    return target


def _write(folder: Path, name: str, content: str, *, private: bool) -> None:
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ConfigError(f"{name!r} is not a file name within its volume")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    path.chmod(0o600 if private else 0o644)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def rewritten(text: str, mounted: Mapping[str, str]) -> str:
    """Replaces mount points at the beginning of paths by their folders, the longest first."""
    for point in sorted(mounted, key=len, reverse=True):
        if point != "/":
            text = re.sub(rf"(?<![\w./-]){re.escape(point)}(?=$|[/\s\"';:,)])", lambda _: mounted[point], text)  # noqa: B023
    return text


# processes


def specs(
    graph: Graph, role: Role, folder: Path, planes: Planes, overrides: Overrides, gpus: Sequence[Sequence[int]],
    http_port: int,
) -> list[ChildSpec]:  # fmt: skip
    """Returns the processes of one component. `gpus` has the numbers of each process's GPUs; it is empty without GPUs."""
    component = role.component
    mounted = mounts(graph, component, folder)
    words = [rewritten(word, mounted) for word in _command_words(component)]
    directory = Path(rewritten(str(component.main.get("workingDir") or ""), mounted) or ".")
    where = (
        directory if directory.is_dir() and component.main.get("workingDir") else _made(folder / component.key / "work")
    )
    found = []
    for number in range(role.replicas):
        pod = f"{graph.name}-{component.key}-{number}"
        env = {name: rewritten(value, mounted) for name, value in environment(graph, role, pod).items()}
        env |= _own_env(graph, role, planes, overrides, pod, gpus[number] if gpus else None, http_port + number)
        grace = float(component.pod.get("terminationGracePeriodSeconds") or GRACE)
        found.append(ChildSpec(f"{component.key}-{number}", words, env, str(where), grace, whole_group=True))
    return found


def _own_env(
    graph: Graph, role: Role, planes: Planes, overrides: Overrides, pod: str, gpus: Sequence[int] | None, http_port: int
) -> dict[str, str]:
    """Returns the variables that the local run sets itself, over the file's."""
    python = str(Path(sys.executable).parent)
    found = {
        "PATH": f"{python}{os.pathsep}{os.environ.get('PATH', '')}",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(PATH), os.environ.get("PYTHONPATH", "")])),
        "NATS_URL": planes.nats_url, "NATS_SERVER": planes.nats_url,
        "ETCD_URL": planes.etcd_url, "ETCD_ENDPOINTS": planes.etcd_url,
        "DYN_NAMESPACE": graph.dynamo_namespace, "POD_NAME": pod,
        "DYN_SYSTEM_PORT": "0",  # replicas of a pod have one port each, processes share this machine's
    }  # fmt: skip
    if role.is_frontend:
        found |= {"DYN_HTTP_PORT": str(http_port), "DYNAMO_PORT": str(http_port)}
        return found
    if overrides.executor:
        found["DYN_EXECUTOR"] = overrides.executor
    if overrides.model_path:
        found["DYN_MODEL_PATH"] = overrides.model_path
    if gpus is not None:
        found["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
    return found


def given_planes(graph: Graph) -> Planes:
    """Returns the addresses of NATS and etcd that the file names and this machine can resolve; empty for the others."""
    nats = etcd = ""
    for component in graph.components:
        env = _plain_env(graph, component)
        adopt(env)
        nats, etcd = nats or env.get("NATS_URL", ""), etcd or env.get("ETCD_URL", "")
    return Planes(nats if _resolves(nats, 4222) else "", etcd if _resolves(etcd, 2379) else "")


def _resolves(url: str, port: int) -> bool:
    try:
        for server in servers(url, "the address", port) if url else ():
            socket.getaddrinfo(server.host, server.port)
            return True
    except (OSError, ConfigError):
        pass
    return False


def default_mode(roles: Sequence[Role]) -> str | None:
    """Returns the mode of workers whose command names none, in a deployment with prefill workers: with vLLM and SGLang
    those are the decode workers."""
    modes = {role.translation.value("--disaggregation-mode") for role in roles if not role.is_frontend}
    return "decode" if "prefill" in modes and "decode" not in modes else None
