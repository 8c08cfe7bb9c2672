"""Engine options: precedence, old spellings, places of errors, and the options that a role needs."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import yaml

from dynserve.config import TINY_MODEL, WorkerConfig
from dynserve.errors import ConfigError
from dynserve.executors.option_names import ARGS
from dynserve.executors.trtllm import PIN
from dynserve.executors.trtllm.options import Options, check_names, llm_arguments, read_options, resolved_backend

HERE = Path(__file__).parent
DOCKER = HERE.parent.parent.parent / "docker" / "config"
OLD_SCHEMA: Any = {**ARGS, "cache_transceiver_config": dict.fromkeys(["backend", "max_tokens_in_buffer"])}
OLD_SCHEMA = {name: nested for name, nested in OLD_SCHEMA.items() if name != "telemetry_config"}


def given(tmp_path: Path, text: str = "", **config: Any) -> tuple[Options, WorkerConfig]:
    file = tmp_path / "engine.yaml"
    file.write_text(text)
    made = WorkerConfig(executor="trtllm", extra_engine_args=str(file), **config)
    return read_options(made), made


def arguments(tmp_path: Path, text: str = "", version: str = PIN, schema: Any = ARGS, **config: Any) -> dict[str, Any]:
    options, made = given(tmp_path, text, **config)
    check_names(options, schema, version)
    return llm_arguments(options, made, schema, version)


def test_the_json_object_wins_over_the_file_and_the_file_over_flags(tmp_path: Path) -> None:
    text = "max_batch_size: 2\nmax_num_tokens: 20\nkv_cache_config: {enable_block_reuse: true}\nscheduler_config: {}\n"
    made = arguments(
        tmp_path, text, max_batch_size=1, max_num_tokens=10, max_seq_len=100, kv_block_size=16,
        free_gpu_memory_fraction=0.5, override_engine_args='{"max_num_tokens": 30, "kv_cache_config": {"dtype": "fp8"}}',
    )  # fmt: skip
    assert (made["max_batch_size"], made["max_num_tokens"], made["max_seq_len"]) == (2, 30, 100)
    cache = {"tokens_per_block": 16, "free_gpu_memory_fraction": 0.5, "enable_block_reuse": True, "dtype": "fp8"}
    assert made["kv_cache_config"] == cache | {"event_buffer_max_size": 100_000}


def test_only_kv_cache_options_that_were_set_are_passed_on(tmp_path: Path) -> None:
    assert arguments(tmp_path)["kv_cache_config"] == {"event_buffer_max_size": 100_000}
    assert arguments(tmp_path, kv_events=False)["kv_cache_config"] == {}
    off = "kv_cache_config: {enable_block_reuse: false}"
    assert arguments(tmp_path, off)["kv_cache_config"] == {"enable_block_reuse": False}


def test_other_nested_options_are_replaced_and_not_merged(tmp_path: Path) -> None:
    text = "cache_transceiver_config: {backend: UCX, max_tokens_in_buffer: 9000}"
    override = '{"cache_transceiver_config": {"backend": "NIXL"}}'
    made = arguments(tmp_path, text, override_engine_args=override, max_seq_len=512)
    assert made["cache_transceiver_config"] == {
        "backend": "NIXL", "transceiver_runtime": "PYTHON", "kv_transfer_timeout_ms": 60_000, "max_tokens_in_buffer": 512,
    }  # fmt: skip


def test_options_that_serving_needs_are_set_unless_the_user_sets_them(tmp_path: Path) -> None:
    made = arguments(tmp_path)
    assert made["model"] == str(TINY_MODEL) and made["skip_tokenizer_init"] is True
    assert made["enable_iter_perf_stats"] is made["enable_chunked_prefill"] is True
    assert made["guided_decoding_backend"] == "xgrammar" and made["telemetry_config"] == {"disabled": True}
    assert "disable_overlap_scheduler" not in made and "backend" not in made and "trust_remote_code" not in made
    text = "guided_decoding_backend: null\nenable_iter_perf_stats: false\ntelemetry_config: {}\n"
    made = arguments(tmp_path, text)
    assert made["guided_decoding_backend"] is None and made["enable_iter_perf_stats"] is False
    assert made["telemetry_config"] == {}


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_files_with_old_spellings_give_the_same_options_as_current_files(
    role: str, caplog: pytest.LogCaptureFixture
) -> None:
    def made(folder: Path) -> dict[str, Any]:
        config = WorkerConfig(
            executor="trtllm", disaggregation_mode=role,  # type: ignore[arg-type]
            extra_engine_args=str(folder / f"trtllm-{role}-config.yaml"),
        )  # fmt: skip
        options = read_options(config)
        check_names(options, ARGS, PIN)
        return llm_arguments(options, config, ARGS, PIN)

    with caplog.at_level(logging.WARNING):
        old = made(HERE / "old_options")
    (record,) = caplog.records
    for name in (
        "pytorch_backend_config.max_batch_size → max_batch_size",
        "pytorch_backend_config.enable_chunked_context → enable_chunked_prefill",
        f"enable_trt_overlap → disable_overlap_scheduler: {str(role == 'prefill').lower()}",
        "cuda_graph_config.enable_cuda_graph: true → cuda_graph_config: {...}",
        "backend → remove it",
    ):
        assert name in record.message
    caplog.clear()
    new = made(DOCKER)
    assert not caplog.records
    assert old["cache_transceiver_config"].pop("backend") == "DEFAULT"
    assert new["cache_transceiver_config"].pop("backend") == "NIXL"
    assert old == new


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cuda_graph_config: {enable_cuda_graph: false, max_batch_size: 4}", {"cuda_graph_config": None}),
        ("pytorch_backend_config: {use_cuda_graph: false}", {"cuda_graph_config": None}),
        ("pytorch_backend_config: {use_cuda_graph: true}", {"cuda_graph_config": {}}),
        ("pytorch_backend_config: {cuda_graph_batch_sizes: [1, 2]}", {"cuda_graph_config": {"batch_sizes": [1, 2]}}),
        ("cuda_graph_config: {padding_enabled: true}", {"cuda_graph_config": {"enable_padding": True}}),
        ("pytorch_backend_config: {kv_cache_dtype: fp8}", {"kv_cache_config": {"dtype": "fp8"}}),
        ("pytorch_backend_config: {enable_overlap_scheduler: false}", {"disable_overlap_scheduler": True}),
        ("enable_trt_overlap: true", {"disable_overlap_scheduler": False}),
        ("build_config: {max_batch_size: 7}", {"max_batch_size": 7}),
        ("pytorch_backend_config: {moe_backend: CUTLASS}", {"moe_config": {"backend": "CUTLASS"}}),
        ("cuda_graph_config: null", {"cuda_graph_config": None}),
        ("cuda_graph_config: {}", {"cuda_graph_config": {}}),
        ("pytorch_backend_config:\nbackend: pytorch", {}),
    ],
)
def test_old_spellings_are_translated(tmp_path: Path, text: str, expected: dict[str, Any]) -> None:
    options, _ = given(tmp_path, text)
    assert options.values == expected
    check_names(options, ARGS, PIN)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "max_batch_size: 1\nmax_batch_sise: 2",
            r"engine.yaml:2: unknown key 'max_batch_sise' \(did you mean max_batch_size",
        ),
        (
            "kv_cache_config:\n  enable_block_reuse: true\n  free_gpu_mem_fraction: 0.5",
            r"engine.yaml:3: unknown key 'free_gpu_mem_fraction' in kv_cache_config \(did you mean free_gpu_memory_fraction",
        ),
        (
            "pytorch_backend_config:\n  max_batch: 2",
            r"engine.yaml:2: unknown key 'max_batch' \(did you mean max_batch_size",
        ),
        ("kv_cache_config: 3", "engine.yaml:1: kv_cache_config must hold keys and values"),
        ("pytorch_backend_config: 3", "pytorch_backend_config must hold keys and values"),
        ("cuda_graph_config:\n  batch_sizes: [1]\n  max_batch_size: 1", "engine.yaml:3: cuda_graph_config has both"),
        ("backend: tensorrt", "'tensorrt' was removed from TensorRT-LLM; use pytorch"),
        (
            "max_batch_size: 1\npytorch_backend_config:\n  max_batch_size: 2",
            r"engine.yaml:3: max_batch_size is 2 here and 1 at .*engine.yaml:1",
        ),
        ("model: /models/other", "engine.yaml:1: the model is given with --model-path"),
        ("cache_transceiver_config: {backend: NIXEL}", "'NIXEL' is not one of .* .did you mean NIXL"),
        ("cache_transceiver_config: {backend: UCX, transceiver_runtime: PYTHON}", "PYTHON needs backend NIXL, not UCX"),
        (
            "cache_transceiver_config: {backend: UCX}\nkv_cache_config: {use_kv_cache_manager_v2: true}",
            "CPP cannot move the cache of use_kv_cache_manager_v2",
        ),
        ("[1, 2]", "expected keys and values"),
        ("a: [", "is not YAML"),
    ],
)
def test_an_invalid_option_is_reported_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        arguments(tmp_path, text)


def test_an_invalid_override_is_reported_with_its_flag(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--override-engine-args: unknown key 'tokens_per_blok' in kv_cache_config"):
        arguments(tmp_path, override_engine_args='{"kv_cache_config": {"tokens_per_blok": 16}}')
    with pytest.raises(ConfigError, match="--override-engine-args is not JSON"):
        arguments(tmp_path, override_engine_args="{")


@pytest.mark.parametrize(
    "text", ["", "cache_transceiver_config: {max_tokens_in_buffer: 100}", "cache_transceiver_config:"]
)
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_missing_transceiver_is_an_error_that_contains_the_lines_to_add(tmp_path: Path, role: Any, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        given(tmp_path, text, disaggregation_mode=role, max_seq_len=4096)
    said = str(caught.value)
    assert f"a {role} worker" in said and "engine.yaml" in said
    addition = yaml.safe_load(said[said.index("\n") :])
    options, _ = given(tmp_path, yaml.safe_dump(addition), disaggregation_mode=role, max_seq_len=4096)
    assert options.values["cache_transceiver_config"] == {"backend": "NIXL", "max_tokens_in_buffer": 4096}


def test_a_buffer_below_the_longest_prompt_is_a_warning_with_the_number(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = "max_seq_len: 4096\ncache_transceiver_config:\n  backend: NIXL\n  max_tokens_in_buffer: 2048\n"
    made = arguments(tmp_path, text)
    assert made["cache_transceiver_config"]["max_tokens_in_buffer"] == 2048
    assert "engine.yaml:4: max_tokens_in_buffer: 2048 is below max_seq_len (4096)" in caplog.text
    assert "set it to 4096" in caplog.text


def test_options_that_a_version_lacks_are_not_passed_to_it(tmp_path: Path) -> None:
    made = arguments(tmp_path, "cache_transceiver_config: {backend: UCX}", "1.2.1", OLD_SCHEMA, max_seq_len=64)
    assert made["cache_transceiver_config"] == {"backend": "UCX", "max_tokens_in_buffer": 64}
    assert "telemetry_config" not in made
    with pytest.raises(ConfigError, match=r"unknown key 'transceiver_runtime' in cache_transceiver_config \(1.2.1\)"):
        arguments(tmp_path, "cache_transceiver_config: {backend: UCX, transceiver_runtime: CPP}", "1.2.1", OLD_SCHEMA)


def test_the_default_backend_is_resolved_by_variables_then_by_version(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [resolved_backend("DEFAULT", v) for v in (PIN, "1.2.1")] == ["NIXL", "UCX"]
    monkeypatch.setenv("TRTLLM_USE_UCX_KVCACHE", "1")
    assert resolved_backend("DEFAULT", PIN) == "UCX" and resolved_backend("NIXL", PIN) == "NIXL"


def test_prefill_workers_disable_the_overlap_scheduler_by_default(tmp_path: Path) -> None:
    text = "cache_transceiver_config: {backend: NIXL}\n"
    assert arguments(tmp_path, text, disaggregation_mode="prefill")["disable_overlap_scheduler"] is True
    text += "disable_overlap_scheduler: false"
    assert arguments(tmp_path, text, disaggregation_mode="prefill")["disable_overlap_scheduler"] is False


def test_the_option_names_of_the_pinned_version_match_the_contract() -> None:
    contract = json.loads((HERE.parent.parent / "doubles" / "contract.json").read_text())
    models = contract["models"]
    assert ARGS.keys() | {"model", "backend"} == models["TorchLlmArgs"].keys()
    for name, model in {
        "kv_cache_config": "KvCacheConfig",
        "cache_transceiver_config": "CacheTransceiverConfig",
        "cuda_graph_config": "CudaGraphConfig",
        "scheduler_config": "SchedulerConfig",
        "attention_dp_config": "AttentionDpConfig",
    }.items():
        assert (ARGS[name] or {}).keys() == models[model].keys()
