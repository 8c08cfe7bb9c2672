"""Loads a model folder: chooses the device, the data type, the kernels and the number of KV blocks."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from dynserve.config import DtypeName
from dynserve.errors import ConfigError
from dynserve.executors.engine_args import EngineArgs
from dynserve.executors.torch.attention import KvCache
from dynserve.executors.torch.cuda.drawing import Drawing
from dynserve.executors.torch.cuda.forward import MAX_KEYS, Forward
from dynserve.executors.torch.cuda.kernels import Kernels, KernelsFailed, Shape, unfit
from dynserve.executors.torch.cuda.peer import PeerCarrier
from dynserve.executors.torch.cuda.runner import CudaRunner
from dynserve.executors.torch.model import Transformer
from dynserve.executors.torch.model_config import ModelConfig
from dynserve.executors.torch.stepping import PlainRunner, Runner

log = logging.getLogger(__name__)

CACHE_BYTES = 1 << 30  # of KV cache in the host's memory, unless an option sets its size
SMALL_MODEL = 50_000_000  # parameters up to which a second thread makes steps slower
GPU_DEFAULTS: Mapping[str, Any] = MappingProxyType({"max_batch_size": 256, "max_num_tokens": 16384})
GPU_FRACTION = 0.9  # of the memory that the model leaves free, for the KV cache
GPU_RESERVE = 1 << 30  # bytes for what libraries allocate themselves: cuBLAS, CUDA graphs, FlashAttention
OLDEST_CARD = (8, 0)  # lowest compute capability with bfloat16


class ComputeTarget(NamedTuple):
    """The device and the data type that a model is computed with."""

    device: torch.device
    dtype: torch.dtype

    @staticmethod
    def choose(device: str, dtype: DtypeName) -> ComputeTarget:
        """Resolves `auto`. Raises ConfigError if the requested GPU cannot be used."""
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        name, _, number = device.partition(":")
        if name == "cuda" and not torch.cuda.is_available():
            why = "torch finds no GPU; check nvidia-smi" if torch.version.cuda else "this torch is a CPU build"
            raise ConfigError(f"--device {device}: {why}")
        if name == "cuda" and int(number or 0) >= torch.cuda.device_count():
            raise ConfigError(f"--device {device}: torch finds {torch.cuda.device_count()} GPU(s), numbered from 0")
        if dtype == "auto":
            # CPUs compute bfloat16 slowly; float32 also makes every batch size agree on greedy tokens
            dtype = "bfloat16" if name == "cuda" else "float32"
        chosen = torch.device(name, int(number or 0)) if name == "cuda" else torch.device(name)
        return ComputeTarget(chosen, getattr(torch, dtype))

    @property
    def defaults(self) -> Mapping[str, Any]:
        """Engine options that differ on this device."""
        return GPU_DEFAULTS if self.device.type == "cuda" else {}


def load(folder: Path, args: EngineArgs, target: ComputeTarget) -> tuple[Transformer, KvCache, Runner]:
    """Loads the model. Blocks while it reads the weights and, on a GPU, compiles kernels and captures graphs.

    Raises:
        ConfigError: the folder or the model is not usable, or there is not enough memory on the GPU.
    """
    config = ModelConfig.read(folder)
    if target.device.type == "cuda":
        torch.cuda.set_device(target.device)
    try:
        model = Transformer(config, folder, *target)
        if target.device.type == "cuda":
            return _load_on_gpu(folder, args, model)
    except torch.OutOfMemoryError as error:
        raise ConfigError(_too_small(config, target)) from error
    small = model.num_parameters < SMALL_MODEL
    torch.set_num_threads(args.num_threads or (1 if small else os.cpu_count() or 1))
    size = args.kv_cache_config.tokens_per_block
    max_blocks = min(CACHE_BYTES // _block_bytes(model, size), args.max_batch_size * -(-config.max_position // size))
    cache = _cache(folder, model, args, max_blocks)
    log.info("computing with %d thread(s)", torch.get_num_threads())
    return model, cache, PlainRunner(model, cache)


def _load_on_gpu(folder: Path, args: EngineArgs, model: Transformer) -> tuple[Transformer, KvCache, Runner]:
    size = args.kv_cache_config.tokens_per_block
    reserve = _working_memory(model.config, args) + GPU_RESERVE
    free, _ = torch.cuda.mem_get_info()
    fraction = args.kv_cache_config.free_gpu_memory_fraction or GPU_FRACTION
    max_blocks = int((free - reserve) * fraction) // _block_bytes(model, size)
    if max_blocks < -(-args.max_num_tokens // size):
        raise ConfigError(_too_small(model.config, ComputeTarget(model.device, model.dtype)))
    cache = _cache(folder, model, args, max_blocks)
    shape = Shape.of(model.config, size)
    if (reason := _no_kernels(model)) is None:
        try:
            names = Forward.kernel_names(shape, model.config.qkv_bias) + Drawing.kernel_names()
            return (
                model,
                cache,
                _fast_runner(model, cache, args, shape, Kernels(shape, names + PeerCarrier.kernel_names)),
            )
        except (ImportError, KernelsFailed) as error:
            reason = f"the GPU kernels cannot be compiled here ({error})"
    log.warning("this model is computed with torch's own operations, which are slow: %s", reason)
    torch.cuda.synchronize()
    return model, cache, PlainRunner(model, cache)


def _fast_runner(model: Transformer, cache: KvCache, args: EngineArgs, shape: Shape, kernels: Kernels) -> Runner:
    config = model.config
    length = min(args.max_seq_len or config.max_position, config.max_position)
    runner = CudaRunner(
        model, cache, shape, kernels, max_rows=args.max_num_tokens, max_samples=args.max_batch_size, max_seq_len=length
    )
    runner.capture(args.max_num_tokens)
    return runner


def _no_kernels(model: Transformer) -> str | None:
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST_CARD:
        return (
            f"{torch.cuda.get_device_name()} has compute capability {capability[0]}.{capability[1]}; kernels need 8.0"
        )
    if model.dtype != torch.bfloat16:
        return f"the kernels compute bfloat16, not {str(model.dtype).removeprefix('torch.')}"
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        return "the package cuda-bindings, which compiles kernels, is not installed"
    return unfit(model.config)


def _block_bytes(model: Transformer, block_size: int) -> int:
    config = model.config
    return 2 * config.num_layers * block_size * config.num_kv_heads * config.head_dim * model.dtype.itemsize


def _cache(folder: Path, model: Transformer, args: EngineArgs, max_blocks: int) -> KvCache:
    """Allocates the KV cache. `max_blocks` is its number of blocks, unless an option sets it."""
    config, size = model.config, args.kv_cache_config.tokens_per_block
    wanted = args.kv_cache_config.max_tokens
    num_blocks = args.num_blocks or (-(-wanted // size) if wanted else max(1, max_blocks))
    cache = KvCache(
        num_blocks=num_blocks, block_size=size, num_layers=config.num_layers, kv_heads=config.num_kv_heads,
        head_dim=config.head_dim, dtype=model.dtype, device=model.device, model=folder.resolve().name,
        window=config.window, windowed=config.windowed,
    )  # fmt: skip
    log.info(
        "%s on %s: %.1f M parameters, %d KV blocks of %d tokens (%.0f MB)",
        config.family, model.device, model.num_parameters / 1e6, num_blocks, size, num_blocks * cache.block_bytes / 1e6,
    )  # fmt: skip
    return cache


def _working_memory(config: ModelConfig, args: EngineArgs) -> int:
    """Returns the bytes that a step needs beside the weights and the cache."""
    rows, width = args.max_num_tokens, config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads)
    activations = 2 * rows * (2 * config.hidden_size + width + 3 * config.intermediate_size)
    logits = 4 * args.max_batch_size * config.vocab_size
    attention = 4 * rows * config.num_heads * config.head_dim
    longest = min(args.max_seq_len or config.max_position, config.max_position)
    keys = 2 * 4 * max(MAX_KEYS, longest) * config.num_kv_heads * config.head_dim  # two copies
    return activations + logits + attention + keys


def _too_small(config: ModelConfig, target: ComputeTarget) -> str:
    if target.device.type != "cuda":
        return "there is not enough memory for this model"
    free, total = torch.cuda.mem_get_info()
    return (
        f"the GPU has {total / 1e9:.0f} GB, of which {free / 1e9:.1f} GB are free: not enough for this model and its KV "
        "cache; lower --max-num-tokens, --max-batch-size or kv_cache_config.max_tokens, or find its users with nvidia-smi"
    )
