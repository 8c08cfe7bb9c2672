"""The device, data type and carriers that a worker chooses where there is no GPU."""

from __future__ import annotations

import json

import pytest
import torch

from dynserve.config import TINY_MODEL, UpConfig, WorkerConfig
from dynserve.errors import ConfigError
from dynserve.executors.base import open_executor
from dynserve.executors.engine_args import engine_args
from dynserve.executors.torch.cuda.kernels import Product, Shape, unfit
from dynserve.executors.torch.loading import ComputeTarget
from dynserve.executors.torch.model_config import ModelConfig
from dynserve.local.gpus import gpus
from dynserve.local.up import spread

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


def test_without_a_gpu_auto_is_the_cpu_in_float32() -> None:
    assert ComputeTarget.choose("auto", "auto") == (torch.device("cpu"), torch.float32)
    assert ComputeTarget.choose("cpu", "bfloat16") == (torch.device("cpu"), torch.bfloat16)
    assert ComputeTarget.choose("auto", "auto").defaults == {}


def test_a_requested_gpu_that_is_missing_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"--device cuda:1: "):
        ComputeTarget.choose("cuda:1", "auto")


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "CPU", "cuda:1000", ""])
def test_an_invalid_device_name_is_refused(device: str) -> None:
    with pytest.raises(ConfigError, match="--device"):
        WorkerConfig(device=device)
    with pytest.raises(ConfigError, match="--device"):
        UpConfig(device=device)


def test_an_unknown_transceiver_backend_is_refused_by_name() -> None:
    options = json.dumps({"cache_transceiver_config": {"backend": "NIXXL"}})
    with pytest.raises(ConfigError, match=r"'NIXXL'.*did you mean NIXL"):
        engine_args(WorkerConfig(override_engine_args=options))


async def test_an_executor_reports_its_kv_transport_and_layout() -> None:
    async with open_executor(WorkerConfig(model_path=str(TINY_MODEL))) as executor:
        assert executor.describe() == {"kv_transfer": "tcp"}
        assert (
            executor.limits.pairing == {"KV cache": "float32:4x2x32x2x32"} and not executor.limits.single_use_handoffs
        )


def test_flags_take_precedence_over_the_defaults_of_a_device() -> None:
    found = engine_args(WorkerConfig(max_num_tokens=77), {"max_batch_size": 256, "max_num_tokens": 16384})
    assert (found.max_batch_size, found.max_num_tokens) == (256, 77)


def test_workers_are_spread_over_gpus_and_share_them_if_there_are_too_few() -> None:
    assert spread("auto", 0, 2) == [[], []]
    assert spread("cpu", 0, 1) == [["--device", "cpu"]]
    assert spread("auto", 4, 3) == [["--device", f"cuda:{n}"] for n in range(3)]
    assert spread("auto", 2, 3) == [
        ["--device", "cuda:0", "--free-gpu-memory-fraction", "0.40"], ["--device", "cuda:1"],
        ["--device", "cuda:0", "--free-gpu-memory-fraction", "0.40"],
    ]  # fmt: skip


def test_only_gpus_in_cuda_visible_devices_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    for visible, number in (("0,1, 3", 3), ("", 0), ("-1", 0), ("GPU-abc", 1)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert gpus() == number
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("PATH", "/nowhere")
    assert gpus() == 0


def test_unsupported_model_shapes_are_reported_with_their_cause() -> None:
    config = ModelConfig.read(TINY_MODEL)
    assert unfit(config) is None
    for change, words in (
        ({"head_dim": 80}, "heads of 80"),
        ({"num_kv_heads": 3}, "evenly"),
        ({"o_bias": True}, "biases"),
        ({"mlp_bias": True}, "biases"),
        ({"activation": "gelu"}, "activation gelu"),
        ({"windowed": frozenset({1}), "window": 8}, "sliding-window"),
    ):
        changed = ModelConfig(**(vars(config) | change))
        assert words in str(unfit(changed))


def test_matrix_products_are_split_into_enough_thread_blocks() -> None:
    """The products of Qwen2.5-0.5B for one row and several: all rows are computed, by some 300 blocks where possible."""
    for n, k, flags in ((1152, 896, 3), (896, 896, 4), (9728, 896, 9), (896, 4864, 4), (151936, 896, 49)):
        for columns in (1, 5, 8):
            name, blocks = Product(n, k, flags).kernel(columns)
            numbers = [int(word) for word in name[name.index("<") + 1 : -1].split(", ")]
            rows = 8 // numbers[1] * numbers[2] if columns == 1 else 16 * numbers[1]
            assert (blocks - 1) * rows < n <= blocks * rows
            assert blocks >= 50


def test_query_heads_of_a_kv_head_are_computed_together_as_far_as_they_fit() -> None:
    config = ModelConfig.read(TINY_MODEL)
    for heads, kv, together in ((14, 2, 7), (32, 8, 4), (32, 32, 1), (64, 4, 8), (40, 4, 5), (22, 2, 1)):
        changed = ModelConfig(**(vars(config) | {"num_heads": heads, "num_kv_heads": kv}))
        assert Shape.of(changed, 32).heads_together == together
