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
from dynserve.executors.trtllm.arguments import llm_arguments, resolved_backend
from dynserve.executors.trtllm.options import Options, check_names, read_options

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
    return llm_arguments(options, made, schema, version).keywords


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


def test_a_block_of_the_file_replaces_that_of_flags_and_the_override_is_merged_at_every_depth(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = (
        "cache_transceiver_config: {backend: NIXL, max_tokens_in_buffer: 9000}\nmax_batch_size: 4\n"
        "kv_cache_config: {block_reuse_config: {policy: per_request, max_num_turns: 2}, tokens_per_block: 64}\n"
        "cuda_graph_config: {max_batch_size: 4}\nmoe_config: {backend: CUTLASS, max_num_tokens: 3}\n"
    )
    override = {
        "cache_transceiver_config": {"kv_transfer_timeout_ms": 5},
        "kv_cache_config": {"block_reuse_config": {"max_num_turns": 3}, "dtype": "fp8"},
        "cuda_graph_config": None,
        "max_batch_size": 8,
    }
    with caplog.at_level(logging.INFO):
        made = arguments(tmp_path, text, override_engine_args=json.dumps(override), max_batch_size=2, max_seq_len=512)
    assert made["cache_transceiver_config"] == {
        "backend": "NIXL", "transceiver_runtime": "PYTHON", "kv_transfer_timeout_ms": 5, "max_tokens_in_buffer": 9000,
    }  # fmt: skip
    cache = made["kv_cache_config"]
    assert cache["block_reuse_config"] == {"policy": "per_request", "max_num_turns": 3}
    assert (cache["tokens_per_block"], cache["dtype"], made["cuda_graph_config"]) == (64, "fp8", None)
    assert made["moe_config"] == {"backend": "CUTLASS", "max_num_tokens": 3}
    said = [record.message for record in caplog.records if "replace others" in record.message]
    file = tmp_path / "engine.yaml"
    assert said == [
        "engine options that replace others: max_batch_size: 4 (was 2, --max-batch-size)",
        f"engine options that replace others: cuda_graph_config: null (was {{'max_batch_size': 4}}, {file}:4); "
        f"max_batch_size: 8 (was 4, {file}:2)".replace("'", '"'),
    ]


def test_options_that_serving_needs_are_set_unless_the_user_sets_them(tmp_path: Path) -> None:
    made = arguments(tmp_path)
    assert made["model"] == str(TINY_MODEL) and made["skip_tokenizer_init"] is True
    assert made["guided_decoding_backend"] == "xgrammar" and made["telemetry_config"] == {"disabled": True}
    assert "disable_overlap_scheduler" not in made and "backend" not in made and "trust_remote_code" not in made
    text = "guided_decoding_backend: null\nenable_iter_perf_stats: false\ntelemetry_config: {disabled: false}\n"
    made = arguments(tmp_path, text)
    assert made["guided_decoding_backend"] is None and made["enable_iter_perf_stats"] is False
    assert made["telemetry_config"] == {"disabled": False}
    made = arguments(tmp_path, "telemetry_config: {usage_context: cli_serve}")
    assert made["telemetry_config"] == {"disabled": True, "usage_context": "cli_serve"}


def test_options_that_cost_throughput_are_set_only_where_the_version_needs_them(tmp_path: Path) -> None:
    """A file that does not mention chunked prefill was measured without it."""
    file = arguments(tmp_path, "cache_transceiver_config: {backend: NIXL}", disaggregation_mode="prefill")
    assert not file.keys() & {"enable_iter_perf_stats", "disable_overlap_scheduler", "enable_chunked_prefill"}
    without_file = WorkerConfig(executor="trtllm")
    made = llm_arguments(read_options(without_file), without_file, ARGS, PIN).keywords
    assert made["enable_chunked_prefill"] is True and "enable_iter_perf_stats" not in made
    text = "cache_transceiver_config: {backend: UCX}"
    old = arguments(tmp_path, text, "1.2.1", OLD_SCHEMA, disaggregation_mode="prefill")
    assert old["enable_iter_perf_stats"] is old["disable_overlap_scheduler"] is True
    for version, needed in (("1.3.0rc23", True), ("1.3.0rc24", False), ("1.3.0", False), ("1.4.0rc1", False)):
        made = arguments(tmp_path, text, version, disaggregation_mode="prefill")
        assert made.get("disable_overlap_scheduler", False) is needed and "enable_iter_perf_stats" not in made
    text += "\ndisable_overlap_scheduler: false"
    assert (
        arguments(tmp_path, text, "1.2.1", OLD_SCHEMA, disaggregation_mode="prefill")["disable_overlap_scheduler"]
        is False
    )


@pytest.mark.parametrize(
    ("text", "version", "backend", "skips_tokenizer", "reason"),
    [
        ("", PIN, "xgrammar", True, ""),
        ("guided_decoding_backend: llguidance", PIN, "llguidance", True, ""),
        ("guided_decoding_backend: null", PIN, None, True, "is null"),
        ("speculative_config: {decoding_type: MTP}", PIN, None, True, "speculative_config"),
        ("speculative_config: {decoding_type: MTP}\nguided_decoding_backend: xgrammar", PIN, "xgrammar", True, ""),
        ("speculative_config: null", PIN, "xgrammar", True, ""),
        # 1.2 needs the tokenizer for a backend
        ("", "1.2.1", "xgrammar", False, ""),
        ("guided_decoding_backend: null", "1.2.1", None, True, "is null"),
        ("speculative_config: {decoding_type: NGram}", "1.2.1", None, True, "speculative_config"),
    ],
)
def test_a_grammar_backend_is_set_where_it_costs_nothing_else(
    tmp_path: Path, text: str, version: str, backend: str | None, skips_tokenizer: bool, reason: str
) -> None:
    options, config = given(tmp_path, text)
    made = llm_arguments(options, config, ARGS if version == PIN else OLD_SCHEMA, version)
    found = made.keywords
    assert (found["guided_decoding_backend"], found["skip_tokenizer_init"]) == (backend, skips_tokenizer)
    assert (reason in made.no_grammars) if reason else made.no_grammars == ""


def test_options_without_effect_are_dropped_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = arguments(
        tmp_path, "sampler_type: TRTLLMSampler\nnum_postprocess_workers: 4\npostprocess_tokenizer_dir: /x\n"
    )
    assert not made.keys() & {"sampler_type", "num_postprocess_workers", "postprocess_tokenizer_dir"}
    assert "engine.yaml:1: sampler_type has no effect in this version" in caplog.text
    assert "engine.yaml:2: num_postprocess_workers: ignored, as the engine returns token ids" in caplog.text
    has_it: Any = {**OLD_SCHEMA, "sampler_type": None}
    assert arguments(tmp_path, "sampler_type: TorchSampler", "1.2.1", has_it)["sampler_type"] == "TorchSampler"


@pytest.mark.parametrize(
    ("cache", "expected", "said"),
    [
        ("{event_buffer_max_size: 0}", {"event_buffer_max_size": 100_000}, "event_buffer_max_size: 0 is raised to 100000"),
        (
            "{kv_events_config: {enable_kv_cache_events: true, topic: x}}",
            {"kv_events_config": {"enable_kv_cache_events": False, "topic": "x"}, "event_buffer_max_size": 100_000},
            "enable_kv_cache_events is set to false",
        ),
        (
            "{kv_events_config: {enable_kv_cache_events: true, publisher: 'null'}}",
            {"kv_events_config": {"enable_kv_cache_events": True, "publisher": "null"}, "event_buffer_max_size": 100_000},
            "",
        ),
        ("{enable_block_reuse: false, event_buffer_max_size: 0}", {"enable_block_reuse": False, "event_buffer_max_size": 0}, ""),
    ],
)  # fmt: skip
def test_options_without_which_no_kv_events_come_are_set(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, cache: str, expected: dict[str, Any], said: str
) -> None:
    text = f"kv_cache_config: {cache}"
    assert arguments(tmp_path, text)["kv_cache_config"] == expected
    assert (f"engine.yaml:1: {said}" in caplog.text or said in caplog.text) if said else not caplog.records
    caplog.clear()
    assert arguments(tmp_path, text, kv_events=False)["kv_cache_config"] == yaml.safe_load(cache)
    assert not caplog.records


def test_a_size_that_the_engine_does_not_tell_is_read_from_its_statistics(tmp_path: Path) -> None:
    """Candidates of 1.3 before the getter of the capacity, say."""
    options, config = given(tmp_path)
    made = llm_arguments(options, config, ARGS, "1.3.0rc5", tells_size=False).keywords
    assert made["enable_iter_perf_stats"] is True and made["skip_tokenizer_init"] is False


def test_a_null_that_the_field_itself_does_not_take_is_dropped(tmp_path: Path) -> None:
    assert "multimodal_config" not in arguments(tmp_path, "multimodal_config: null")


def test_an_attention_backend_that_caches_no_prefixes_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = arguments(tmp_path, "attn_backend: FLASHINFER")
    assert made["kv_cache_config"] == {} and "with attn_backend FLASHINFER the engine caches no prefixes" in caplog.text


def test_a_transfer_without_a_limit_goes_only_with_the_cpp_runtime(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for_ever = "cache_transceiver_config:\n  backend: NIXL\n  kv_transfer_timeout_ms: null\n"
    made = arguments(tmp_path, for_ever)["cache_transceiver_config"]
    assert (made["transceiver_runtime"], made["kv_transfer_timeout_ms"]) == ("CPP", None)
    assert "holds the KV blocks of lost requests for ever" in caplog.text
    with pytest.raises(
        ConfigError, match="engine.yaml:3: kv_transfer_timeout_ms: null does not go with transceiver_runtime"
    ):
        arguments(tmp_path, for_ever + "  transceiver_runtime: PYTHON")


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
        return llm_arguments(options, config, ARGS, PIN).keywords

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
    if role == "prefill":  # the guide's file is of a version that needs it
        assert old.pop("disable_overlap_scheduler") is True
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
        ("kv_cache_config: {kv_events_config: true}", "engine.yaml:1: kv_events_config must hold keys and values"),
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
        "lora_config": "LoraConfig",
    }.items():
        assert (ARGS[name] or {}).keys() == models[model].keys()


@pytest.mark.parametrize("backend", ["ucx", "default", "Nixl", "mooncake", "MPI"])
def test_backends_of_the_transceiver_are_read_in_lower_case_too(tmp_path: Path, backend: str) -> None:
    made = arguments(tmp_path, f"cache_transceiver_config: {{backend: {backend}}}")
    assert made["cache_transceiver_config"]["backend"] == backend.upper()
    with pytest.raises(ConfigError, match=r"backend 'ucxx' is not one of .*\(did you mean UCX\?\)"):
        given(tmp_path, "cache_transceiver_config: {backend: ucxx}")


def test_options_of_old_recipes_are_translated_or_dropped_with_a_hint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = "use_torch_sampler: true\nenable_trtllm_sampler: false\nautotuner_enabled: false\n"
    text += (
        "cuda_graph_padding_enabled: true\npytorch_backend_config: {mixed_sampler: true, autotuner_enabled: false}\n"
    )
    made = arguments(tmp_path, text)
    assert made["enable_autotuner"] is False and made["cuda_graph_config"] == {"enable_padding": True}
    assert not [name for name in made if "sampler" in name]
    for hint in (
        "use_torch_sampler → remove it: there is one sampler",
        "enable_trtllm_sampler → remove it",
        "pytorch_backend_config.mixed_sampler → remove it",
        "autotuner_enabled → enable_autotuner",
        "cuda_graph_padding_enabled → cuda_graph_config.enable_padding",
    ):
        assert hint in caplog.text
