"""Sampling parameters: keyword-only, checked when they are made; `dataclasses.replace` checks again."""

from __future__ import annotations

from typing import Any

from ._contract import dataclass_of


class _Sampling:
    def __post_init__(self: Any) -> None:
        if self.best_of is None:
            self.best_of = self.n
        if self.best_of < self.n:
            raise ValueError(f"best_of ({self.best_of}) cannot be less than n ({self.n})")
        if self.best_of > 1 and self._greedy and not self.use_beam_search:
            raise ValueError("Greedy decoding in the LLM API does not allow multiple returns")
        if self.max_tokens is not None and self.max_tokens <= 0:
            raise ValueError(f"max_tokens must be positive, got {self.max_tokens}")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"require top_k >= 0, got top_k={self.top_k}")
        if self.top_p is not None and not 0 <= self.top_p <= 1:
            raise ValueError(f"require 0 <= top_p <= 1, got top_p={self.top_p}")
        if self.temperature is not None and self.temperature < 0:
            raise ValueError(f"require temperature >= 0, got temperature={self.temperature}")
        if self.min_tokens is not None and self.min_tokens < 0:
            raise ValueError("min_tokens cannot be negative")
        if self.seed is not None and not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed does not fit 64 bits: {self.seed}")
        for name in ("stop_token_ids", "bad_token_ids"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, list) and all(type(item) is int for item in value)):
                raise TypeError(f"{name} must be a list of int")
        if self.guided_decoding is not None and not isinstance(self.guided_decoding, GuidedDecodingParams):
            raise TypeError("guided_decoding must be GuidedDecodingParams")
        if self.end_id is not None and self.pad_id is None:
            self.pad_id = self.end_id

    @property
    def _greedy(self: Any) -> bool:
        if self.temperature is None and self.top_p is None and self.top_k is None:
            return True
        return self.temperature == 0 or self.top_k == 1 or self.top_p == 0


class _Guided:
    def __post_init__(self: Any) -> None:
        given = [n for n in ("json", "regex", "grammar", "structural_tag") if getattr(self, n) is not None]
        if len(given) + bool(self.json_object) > 1:
            raise ValueError(f"only one guide can be used at a time, got {given}")


GuidedDecodingParams = dataclass_of("GuidedDecodingParams", _Guided)
SamplingParams = dataclass_of("SamplingParams", _Sampling)
