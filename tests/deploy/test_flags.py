from __future__ import annotations

import json
from typing import get_args

import pytest

from dynserve.config import ExecutorName, FrontendConfig, RouterMode, WorkerConfig, load
from dynserve.deploy.flags import EXECUTORS, TABLES, translate
from dynserve.errors import ConfigError

MODEL = {"DYN_MODEL_PATH": "/models/m"}


@pytest.mark.parametrize("module", TABLES)
def test_every_flag_of_ours_in_the_tables_exists(module: str) -> None:
    options = FrontendConfig if module == "frontend" else WorkerConfig
    ours = {rule.flag for rule in TABLES[module].values() if rule.flag}
    assert ours <= {"--" + name.replace("_", "-") for name in options.__dataclass_fields__}
    assert set(EXECUTORS.values()) <= set(get_args(ExecutorName))


def test_the_guides_worker_is_translated_to_options_that_the_worker_accepts() -> None:
    found = translate(
        "trtllm",
        ["--model-path", "Qwen/Qwen2.5-0.5B-Instruct", "--disaggregation-mode", "prefill", "--max-seq-len=4096",
         "--free-gpu-memory-fraction", "0.8", "--publish-events-and-metrics", "--enable-attention-dp"],
        MODEL,
    )  # fmt: skip
    config = load(WorkerConfig, "p", found.arguments, {})
    assert (found.role, config.model_path, config.served_model_name) == (
        "worker",
        "/models/m",
        "Qwen/Qwen2.5-0.5B-Instruct",
    )
    assert (config.role, config.max_seq_len, config.executor) == ("prefill", 4096, "trtllm")
    assert json.loads(config.override_engine_args or "") == {"enable_attention_dp": True}
    assert found.notes == ["--publish-events-and-metrics has no meaning here"]


def test_workers_of_other_engines_run_on_the_executor_that_the_user_chooses() -> None:
    vllm = ["--model", "m", "--is-decode-worker", "--gpu-memory-utilization", "0.7", "--kv-transfer-config", "{}"]
    found = translate("vllm", vllm, MODEL)
    config = load(WorkerConfig, "p", found.arguments, {})
    assert (config.role, config.executor, config.free_gpu_memory_fraction) == ("decode", "torch", 0.7)
    assert found.value("--executor") == "torch"
    assert translate("vllm", vllm, MODEL | {"DYN_EXECUTOR": "simulated"}).value("--executor") is None
    mocker = translate(
        "mocker", ["--model-path", "m", "--speedup-ratio", "2", "--num-gpu-blocks-override", "99"], MODEL
    )
    assert json.loads(mocker.value("--override-engine-args") or "") == {"speed": 2.0, "num_blocks": 99}
    assert translate("sglang", ["--model-path", "m", "--tp", "2"], MODEL).value("--tensor-parallel-size") == "2"


def test_an_override_of_the_user_wins_over_a_translated_option() -> None:
    given = ["--model-path", "m", "--max-beam-width", "2", "--override-engine-args", '{"max_beam_width": 1, "x": 3}']
    assert json.loads(translate("trtllm", given, MODEL).value("--override-engine-args") or "") == {
        "max_beam_width": 1,
        "x": 3,
    }


@pytest.mark.parametrize(
    ("arguments", "mode"),
    [
        (["--router-mode", "round-robin"], "round-robin"),
        (["--router-mode", "kv", "--kv-overlap-score-weight", "0"], "least-loaded"),
        (["--kv-overlap-score-weight", "0.5"], "kv"),
    ],
)
def test_router_modes_keep_their_meaning(arguments: list[str], mode: str) -> None:
    config = load(FrontendConfig, "p", translate("frontend", arguments, {}).arguments, {})
    assert config.router_mode == mode and mode in get_args(RouterMode)


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("planner", [], "dynamo.planner has no counterpart"),
        ("trtlm", [], "did you mean trtllm"),
        ("trtllm", ["--model-pth", "m"], r"unknown argument '--model-pth' \(did you mean --model-path\?\)"),
        ("trtllm", ["--model-path"], "--model-path needs a value"),
        ("trtllm", ["--max-beam-width", "two"], "--max-beam-width: 'two' is not a number"),
        ("trtllm", ["--disaggregation-mode", "encode"], "text only"),
        ("trtllm", ["--modality", "multimodal"], "--modality: dynserve serves text only"),
        ("vllm", ["--data-parallel-size", "4"], "run more replicas"),
        ("frontend", ["--router-mode", "device-aware-weighted"], "no counterpart"),
        ("frontend", ["-i"], "no interactive mode"),
    ],
)
def test_a_flag_without_a_counterpart_is_refused(module: str, arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        translate(module, arguments, MODEL)


def test_values_that_change_nothing_are_accepted_for_refused_flags() -> None:
    for module, arguments in (("vllm", ["--data-parallel-size", "1"]), ("trtllm", ["--modality", "text"])):
        assert "--data-parallel-size" not in translate(module, arguments, MODEL).arguments


def test_a_hub_id_stays_the_served_name_whichever_folder_holds_the_model() -> None:
    found = translate("trtllm", ["--model-path", "Org/Name"], {})
    assert (found.value("--model-path"), found.value("--served-model-name")) == ("Org/Name", "Org/Name")
    found = translate("trtllm", ["--model-path", "Org/Name"], {"DYN_MODEL_PATH": "/models/name"})
    assert (found.value("--model-path"), found.value("--served-model-name")) == ("/models/name", "Org/Name")
