"""`Finding`, the result of one check of the doctor, and `DoctorConfig`, the options of the checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal, NamedTuple

from dynserve.config import TINY_MODEL, DisaggregationMode, ExecutorName, PlanesConfig, option

FindingState = Literal["ok", "warn", "fail", "skip"]
_WIDTH = 16


@dataclass(frozen=True, kw_only=True)
class DoctorConfig(PlanesConfig):
    role: Literal["frontend"] | DisaggregationMode | None = option(
        None, "frontend, prefill, decode or prefill_and_decode; default: a frontend and a worker", "DYN_ROLE"
    )
    executor: ExecutorName | None = option(
        None, "torch, simulated or trtllm; default: trtllm if it is installed, else torch", "DYN_EXECUTOR"
    )
    model_path: str = option(str(TINY_MODEL), "folder with config.json, weights and tokenizer", "DYN_MODEL_PATH")
    http_port: int = option(8000, "port of the OpenAI server", "DYN_HTTP_PORT")
    system_port: int = option(0, "port of a worker's system server", "DYN_SYSTEM_PORT")
    extra_engine_args: str | None = option(None, "YAML file with engine options")
    override_engine_args: str | None = option(None, "JSON object with engine options; wins over the file")
    trtllm_selftest: bool = option(
        False,
        "build TensorRT-LLM engines and compare what they do with what the executor relies on; takes several minutes",
    )
    json: bool = option(False, "print the findings as JSON")

    @property
    def engine(self) -> ExecutorName:
        return self.executor or ("trtllm" if find_spec("tensorrt_llm") is not None else "torch")

    @property
    def trtllm(self) -> bool:
        return self.engine == "trtllm" and self.role != "frontend"

    @property
    def worker_role(self) -> DisaggregationMode | None:
        if self.role == "frontend":
            return None
        return self.role or "prefill_and_decode"


class Finding(NamedTuple):
    name: str
    state: FindingState
    text: str
    cure: str = ""

    @property
    def line(self) -> str:
        return f"{self.state:<5} {self.name:<{_WIDTH}} {self.text}" + (f"; {self.cure}" if self.cure else "")


Check = Callable[[DoctorConfig], Iterator[Finding]]
