from __future__ import annotations

from pathlib import Path

import pytest

from dynserve.config import TINY_MODEL
from dynserve.deploy.documents import Notes
from dynserve.deploy.graph import Graph
from dynserve.deploy.local import LocalConfig, free_port, scale_of, share_gpus
from dynserve.deploy.plan import (
    Overrides,
    Planes,
    default_mode,
    environment,
    given_planes,
    load_folder,
    mounts,
    rewritten,
    roles_of,
    specs,
)
from dynserve.errors import ConfigError
from dynserve.local.embedded import free_ports
from tests.deploy.test_reader import GUIDE, read

TINY = Overrides(str(TINY_MODEL), "torch")
PLANES = Planes("nats://127.0.0.1:1", "http://127.0.0.1:2")
FRONTEND = "  f: {componentType: frontend}\n"


def guide() -> Graph:
    from dynserve.deploy.reader import read_graph

    graph = read_graph(GUIDE, Notes())
    load_folder(graph, GUIDE.parent, GUIDE)
    return graph


def worker(tmp_path: Path, lines: str, notes: Notes | None = None) -> Graph:
    text = "".join(f"    {line}\n" for line in lines.strip().splitlines())
    return read(tmp_path, f"services:\n{FRONTEND}  w:\n    componentType: worker\n{text}", notes=notes)


COMMAND = "extraPodSpec: {mainContainer: {command: [python3, -m, dynamo.vllm, --model, m]}}"


def test_the_guide_becomes_five_processes_with_their_files(tmp_path: Path) -> None:
    graph = guide()
    roles = roles_of(graph, TINY, Notes())
    made = [spec for role in roles for spec in specs(graph, role, tmp_path, PLANES, TINY, [], 8000)]
    assert [spec.name for spec in made] == [
        "frontend-0", "trtllmprefillworker-0", "trtllmprefillworker-1", "trtllmdecodeworker-0", "trtllmdecodeworker-1",
    ]  # fmt: skip
    frontend, prefill = made[0], made[1]
    assert frontend.command == ["python3", "-m", "dynamo.frontend"] and frontend.environment["DYN_ROUTER_MODE"] == "kv"
    config = tmp_path / "trtllmprefillworker" / "trtllm-config" / "trtllm-prefill-config.yaml"
    assert f"--extra-engine-args {config}" in prefill.command[2] and "pytorch_backend_config" in config.read_text()
    assert not (config.parent / GUIDE.name).exists()  # the deployment itself is no file of the ConfigMap
    env = prefill.environment
    assert (env["NATS_URL"], env["ETCD_URL"], env["LC_ALL"]) == (PLANES.nats_url, PLANES.etcd_url, "C.UTF-8")
    assert (env["DYN_MODEL_PATH"], env["DYN_EXECUTOR"]) == (str(TINY_MODEL), "torch")
    assert env["DYN_NAMESPACE"] == frontend.environment["DYN_NAMESPACE"] == graph.dynamo_namespace
    assert prefill.whole_group and Path(prefill.folder or "").is_dir()


def test_paths_below_a_mount_point_are_rewritten_and_others_are_not() -> None:
    mounted = {"/config": "/tmp/c", "/config/deep": "/tmp/d", "/": "/tmp/r"}
    text = 'a /config/x.yaml "/config" --f=/config/deep/y /configure /my/config/z $H/config'
    assert rewritten(text, mounted) == 'a /tmp/c/x.yaml "/tmp/c" --f=/tmp/d/y /configure /my/config/z $H/config'


def test_an_environment_keeps_its_order_and_its_references(tmp_path: Path) -> None:
    graph = worker(tmp_path, """
envs:
  - {name: POD, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
  - {name: URL, value: "http://$(POD):1/$(LATER)"}
  - {name: LATER, value: x}
  - {name: CPU, valueFrom: {resourceFieldRef: {resource: limits.cpu}}}
  - {name: TOKEN, valueFrom: {secretKeyRef: {name: s, key: missing}}}
  - {name: TEAM, valueFrom: {fieldRef: {fieldPath: "metadata.labels['team']"}}}
  - {name: A, value: own}
labels: {team: red}
resources: {limits: {cpu: "3"}}
envFromSecret: hf-token-secret
extraPodSpec: {mainContainer: {command: [python3, -m, dynamo.vllm, --model, m], env: [{name: A, value: container}, {name: B, value: "1"}]}}
""")  # fmt: skip
    graph.secrets["hf-token-secret"] = {"HF_TOKEN": "t"}
    role = roles_of(graph, TINY, Notes())[1]
    found = environment(graph, role, "g-w-0")
    assert found == {
        "HF_TOKEN": "t", "A": "own", "B": "1", "POD": "g-w-0", "URL": "http://g-w-0:1/$(LATER)", "LATER": "x", "CPU": "3",
        "TEAM": "red",
    }  # fmt: skip


def test_volumes_are_folders_and_secrets_are_private(tmp_path: Path) -> None:
    graph = worker(tmp_path, """
volumeMounts: [{name: cache, mountPoint: /cache}]
extraPodSpec:
  volumes:
    - {name: s, secret: {secretName: s, items: [{key: a, path: sub/b}]}}
    - {name: e, emptyDir: {}}
    - {name: h, hostPath: {path: /usr}}
  mainContainer:
    command: [python3, -m, dynamo.vllm, --model, m]
    volumeMounts: [{name: s, mountPath: /s}, {name: e, mountPath: /e/}, {name: h, mountPath: /h, subPath: lib}]
""")  # fmt: skip
    graph.secrets["s"] = {"a": "x", "c": "y"}
    found = mounts(graph, graph.components[1], tmp_path / "files")
    assert found["/h"] == "/usr/lib" and Path(found["/e"]).is_dir() and found["/cache"].endswith("claims/cache")
    secret = Path(found["/s"]) / "sub" / "b"
    assert secret.read_text() == "x" and secret.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in Path(found["/s"]).rglob("*") if path.is_file()] == ["b"]


def test_a_file_of_a_config_map_cannot_leave_its_volume(tmp_path: Path) -> None:
    graph = worker(tmp_path, """
extraPodSpec:
  volumes: [{name: c, configMap: {name: c}}]
  mainContainer: {command: [python3, -m, dynamo.vllm, --model, m], volumeMounts: [{name: c, mountPath: /c}]}
""")  # fmt: skip
    graph.config_maps["c"] = {"../../x": "y"}
    with pytest.raises(ConfigError, match="not a file name within its volume"):
        mounts(graph, graph.components[1], tmp_path / "files")


def test_workers_without_a_role_are_decode_workers_beside_prefill_workers(tmp_path: Path) -> None:
    text = f"services:\n{FRONTEND}"
    for name, flags in (("p", ", --is-prefill-worker"), ("d", "")):
        text += f"  {name}:\n    extraPodSpec: {{mainContainer: {{command: [python3, -m, dynamo.vllm, --model, m{flags}]}}}}\n"
    assert default_mode(roles_of(read(tmp_path, text), TINY, Notes())) == "decode"
    assert default_mode(roles_of(guide(), TINY, Notes())) is None
    assert default_mode(roles_of(worker(tmp_path, COMMAND), TINY, Notes())) is None


def test_components_that_cannot_run_here_are_reported(tmp_path: Path) -> None:
    notes = Notes()
    planner = "  p: {componentType: planner, extraPodSpec: {mainContainer: {command: [python3, -m, dynamo.planner]}}}\n"
    graph = worker(tmp_path, COMMAND.replace("{mainContainer:", "{nodeSelector: {a: b}, mainContainer:"))
    graph.components += read(tmp_path, f"services:\n{planner}").components
    assert [role.component.name for role in roles_of(graph, TINY, notes)] == ["f", "w"]
    assert sorted(line.split(": ", 1)[1] for line in notes.lines) == [
        "p does not run: dynserve has no planner",
        "w: nodeSelector is ignored: all processes run on this machine",
    ]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("multinode: {nodeCount: 2}\n" + COMMAND, "no workers of 2 nodes"),
        (
            "extraPodSpec: {mainContainer: {command: [sleep, '3']}}",
            "f.yaml:.*: w: its command runs neither a module of dynamo",
        ),
        (COMMAND.replace("--model, m", "--modle, m"), "unknown argument '--modle'"),
    ],
)
def test_a_worker_that_cannot_run_is_an_error(tmp_path: Path, lines: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        roles_of(worker(tmp_path, lines), TINY, Notes())


def test_missing_files_and_components_are_errors(tmp_path: Path) -> None:
    graph = guide()
    graph.config_maps.clear()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="ConfigMap 'trtllm-config' is not in the file"):
        load_folder(graph, tmp_path / "empty", GUIDE)
    with pytest.raises(ConfigError, match="has no component 'decode'; it has frontend, trtllmdecodeworker"):
        roles_of(graph, TINY._replace(scale={"decode": 1}), Notes())
    with pytest.raises(ConfigError, match="g has no worker"):
        roles_of(read(tmp_path, f"services:\n{FRONTEND}"), TINY, Notes())


def test_servers_of_the_file_are_used_only_where_this_machine_reaches_them(tmp_path: Path) -> None:
    assert given_planes(guide()) == Planes("", "")  # names of a cluster
    env = "envs: [{name: NATS_SERVER, value: 'nats://127.0.0.1:4'}, {name: ETCD_ENDPOINTS, value: '127.0.0.1:5'}]\n"
    assert given_planes(worker(tmp_path, env + COMMAND)) == Planes("nats://127.0.0.1:4", "127.0.0.1:5")


def test_gpus_are_handed_out_once_and_too_few_are_an_error() -> None:
    roles, notes = roles_of(guide(), TINY, Notes()), Notes()
    assert share_gpus(roles, 4, notes) == [[[]], [[0], [1]], [[2], [3]]] and not notes.lines
    assert share_gpus(roles, 0, notes) == [[], [], []] and "4 GPUs and this machine has none" in next(iter(notes.lines))
    with pytest.raises(ConfigError, match="asks for 4 GPUs and this machine has 3"):
        share_gpus(roles, 3, notes)


def test_options_are_parsed_or_refused() -> None:
    assert scale_of(" A=2, b=0") == {"a": 2, "b": 0} and scale_of(None) == {}
    for wrong in ("a", "a=", "=2", "a=-1", "a=two"):
        with pytest.raises(ConfigError, match="--scale"):
            scale_of(wrong)
    with pytest.raises(ConfigError, match="--start-timeout-s"):
        LocalConfig(start_timeout_s=0)
    (port,) = free_ports(1)
    assert free_port(port) == port and 8000 <= free_port(0) < 8100
