"""The argument models, made of the contract's tables: strict at every level."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, create_model, model_validator

from .._contract import CONTRACT, OLD, here


class StrictBaseModel(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True)


class _CudaGraph(StrictBaseModel):
    @model_validator(mode="after")
    def _sizes(self: Any) -> Any:
        if self.batch_sizes:
            most = max(self.batch_sizes)
            if self.max_batch_size not in (0, most):
                raise ValueError("cuda_graph_config.max_batch_size must be 0 or the maximum of batch_sizes")
            self.__dict__["max_batch_size"] = most
        elif not self.max_batch_size:
            self.__dict__["max_batch_size"] = 128
        return self


class _Transceiver(StrictBaseModel):
    @model_validator(mode="after")
    def _runtime(self: Any) -> Any:
        if not OLD and self.transceiver_runtime == "PYTHON" and self.backend not in ("NIXL", "DEFAULT", None):
            raise ValueError(f"the Python transceiver runs on NIXL only, not on {self.backend}")
        return self


class _KvCache(StrictBaseModel):
    @model_validator(mode="after")
    def _fraction(self: Any) -> Any:
        fraction = self.free_gpu_memory_fraction
        if fraction is not None and not 0 <= fraction <= 1:
            raise ValueError("kv_cache_config.free_gpu_memory_fraction must be a float between 0 and 1")
        return self


class _Args(StrictBaseModel):
    @model_validator(mode="before")
    @classmethod
    def _nothing_is_the_default(cls, values: Any) -> Any:
        names = ("max_batch_size", "max_num_tokens", "max_input_len", "max_beam_width")
        return (
            {k: v for k, v in values.items() if not (k in names and v is None)} if isinstance(values, dict) else values
        )


_BASES: dict[str, type[StrictBaseModel]] = {
    "CudaGraphConfig": _CudaGraph,
    "CacheTransceiverConfig": _Transceiver,
    "KvCacheConfig": _KvCache,
    "TorchLlmArgs": _Args,
}
_NAMES: dict[str, Any] = {"Any": Any, "Literal": Literal}


def _model(name: str) -> Any:
    fields: dict[str, Any] = {}
    for key, (kind, default) in here(name, CONTRACT["models"][name]).items():
        if OLD and key == "kv_transfer_timeout_ms":
            default = None
        fields[key] = (eval(kind, _NAMES), ... if default == "..." else default)
    made = create_model(name, __base__=_BASES.get(name, StrictBaseModel), **fields)
    _NAMES[name] = made
    return made


KVEventsConfig = _model("KVEventsConfig")
KvCacheConfig = _model("KvCacheConfig")
CacheTransceiverConfig = _model("CacheTransceiverConfig")
CudaGraphConfig = _model("CudaGraphConfig")
LoraConfig = _model("LoraConfig")
SchedulerConfig = _model("SchedulerConfig")
AttentionDpConfig = _model("AttentionDpConfig")
TorchLlmArgs = _model("TorchLlmArgs")
BaseLlmArgs = TorchLlmArgs
