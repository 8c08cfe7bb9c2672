from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dynserve.config import WorkerConfig
from dynserve.errors import ConfigError
from dynserve.executors.engine_args import engine_args


def test_the_json_object_wins_over_the_file_and_the_file_over_flags(tmp_path: Path) -> None:
    file = tmp_path / "e.yaml"
    file.write_text("max_batch_size: 2\nmax_num_tokens: 2\nkv_cache_config: {enable_block_reuse: false}\n")
    args = engine_args(
        WorkerConfig(
            max_batch_size=1,
            max_num_tokens=1,
            max_seq_len=1,
            kv_block_size=16,
            extra_engine_args=str(file),
            override_engine_args='{"max_num_tokens": 3}',
        )
    )
    assert (args.max_batch_size, args.max_num_tokens, args.max_seq_len) == (2, 3, 1)
    assert (args.kv_cache_config.tokens_per_block, args.kv_cache_config.enable_block_reuse) == (16, False)


def test_keys_that_only_tensorrt_llm_knows_are_ignored() -> None:
    engine_args(WorkerConfig(override_engine_args='{"cuda_graph_config": {"max_batch_size": 8}}'))


def test_a_file_for_tensorrt_llm_of_any_version_does_not_stop_this_executor(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "e.yaml"
    file.write_text(
        "backend: pytorch\nuse_torch_sampler: true\nsampler_type: auto\nautotuner_enabled: false\nmax_batch_size: 3\n"
        "cuda_graph_padding_enabled: true\nbuild_config: {max_beam_width: 1}\nwide_ep_of_a_later_version: {a: 1}\n"
        "kv_cache_config: {quantised_by_a_later_version: 4}\ncache_transceiver_config: {backend: ucx}\n"
    )
    args = engine_args(WorkerConfig(extra_engine_args=str(file)))
    assert (args.max_batch_size, args.cache_transceiver_config.backend) == (3, "UCX")
    assert "ignored, unknown to this executor: 'wide_ep_of_a_later_version'" in caplog.text
    assert "'quantised_by_a_later_version' in kv_cache_config" in caplog.text
    assert engine_args(WorkerConfig(override_engine_args='{"cache_transceiver_config": {"backend": "mooncake"}}'))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_batch_sise": 1}, "unknown key 'max_batch_sise' .did you mean max_batch_size"),
        ({"kv_cache_config": {"max_token": 1}}, "unknown key 'max_token' in kv_cache_config .did you mean max_tokens"),
        ({"kv_cache_config": 3}, "kv_cache_config must hold keys and values"),
        ({"max_batch_size": "four"}, "Expected `int`"),
        ({"max_batch_size": 0}, "at least 1"),
    ],
)
def test_an_error_names_the_invalid_option(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        engine_args(WorkerConfig(override_engine_args=json.dumps(options)))


def test_a_missing_options_file_is_an_error_with_its_path() -> None:
    with pytest.raises(ConfigError, match="/nowhere.yaml: No such file"):
        engine_args(WorkerConfig(extra_engine_args="/nowhere.yaml"))
