"""Option files of TensorRT-LLM's users: shapes of job and serving recipes. One file serves all executors."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from dynserve.config import WorkerConfig
from dynserve.doctor.cluster import options as doctors_check
from dynserve.doctor.finding import DoctorConfig
from dynserve.executors.engine_args import engine_args
from dynserve.executors.option_names import ARGS
from dynserve.executors.trtllm import PIN
from dynserve.executors.trtllm.arguments import llm_arguments
from dynserve.executors.trtllm.options import check_names, read_options
from dynserve.executors.trtllm.start import prepare

HERE = Path(__file__).parent
FILES = sorted((HERE / "recipes").glob("*.yaml"))
parametrized = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def test_there_are_ten_recipes() -> None:
    assert len(FILES) == 10


@parametrized
def test_a_tensorrt_llm_worker_passes_on_what_the_pinned_version_takes(file: Path, trtllm_double: None) -> None:
    config = WorkerConfig(executor="trtllm", extra_engine_args=str(file))
    given = read_options(config)
    check_names(given, ARGS, PIN)
    made = llm_arguments(given, config, ARGS, PIN).keywords
    arguments: Any = import_module("tensorrt_llm.llmapi.llm_args").TorchLlmArgs
    found = arguments(**made)
    for name, value in given.values.items():
        if isinstance(value, int | float | str) and name not in ("sampler_type", "num_postprocess_workers"):
            assert getattr(found, name) == value


def test_a_file_of_version_1_2_works_with_that_version(trtllm_double: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRTLLM_DOUBLE_VERSION", "1.2.1")
    file = HERE / "recipes" / "version-1.2.yaml"
    config = WorkerConfig(executor="trtllm", extra_engine_args=str(file))
    made = prepare(config).arguments.keywords
    assert (made["sampler_type"], made["max_batch_size"], made["skip_tokenizer_init"]) == ("TRTLLMSampler", 256, False)
    assert made["cache_transceiver_config"]["kv_transfer_timeout_ms"] is None


@parametrized
@pytest.mark.parametrize("executor", ["torch", "simulated"])
def test_other_executors_take_what_they_know_of_the_same_file(file: Path, executor: Any) -> None:
    made = engine_args(WorkerConfig(executor=executor, extra_engine_args=str(file)))
    assert made.max_num_tokens > 0 and made.cache_transceiver_config.kv_transfer_timeout_ms > 0


@parametrized
@pytest.mark.parametrize("executor", ["trtllm", "torch", "simulated"])
def test_the_doctor_finds_nothing_wrong_with_it(file: Path, executor: Any) -> None:
    config = DoctorConfig(role="prefill_and_decode", executor=executor, extra_engine_args=str(file))
    found = list(doctors_check(config))
    assert found and not [finding for finding in found if finding.state == "fail"]
    assert not [finding for finding in found if "is not a key of version" in finding.text]


def test_null_is_the_default_where_it_is_tensorrt_llms_default() -> None:
    nulls = '{"max_batch_size": null, "cache_transceiver_config": {"backend": null, "kv_transfer_timeout_ms": null}}'
    assert engine_args(WorkerConfig(override_engine_args=nulls)) == engine_args(WorkerConfig())
