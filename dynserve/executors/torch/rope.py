"""Rotary position embeddings: their scalings, and the tables of cosines and sines.

Sources of the scaled frequencies: position interpolation (arXiv 2306.15595) for `linear`, YaRN (arXiv 2309.00071) for
`yarn`, Llama 3.1's model card and its reference code for `llama3`. `dynamic` (NTK-aware scaling) changes the frequencies of
texts longer than `max_position_embeddings` only, and the engine takes no longer ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynserve.errors import ConfigError

KINDS = ("default", "linear", "dynamic", "llama3", "yarn")
_NEEDED = {"linear": ("factor",), "yarn": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}


@dataclass(frozen=True)
class RopeConfig:
    """The rotary embedding of one model. `scaling` has the fields that its kind needs, all of them numbers."""

    kind: str
    theta: float
    head_dim: int
    max_position: int  # tokens
    scaling: Mapping[str, float]
    truncate: bool = True  # YaRN: the bounds of the ramp are whole dimensions

    @staticmethod
    def read(raw: Mapping[str, Any], head_dim: int, max_position: int, where: str) -> RopeConfig:
        """Reads the fields of `config.json`, old and new. Raises ConfigError for a scaling that is not supported."""
        found = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
        if not isinstance(found, dict) or any(isinstance(value, dict) for value in found.values()):
            raise ConfigError(f"{where}: rotary embeddings that differ between layers are not supported")
        kind = found.get("rope_type") or found.get("type") or "default"
        if kind not in KINDS:
            raise ConfigError(f"{where}: rope_type {kind!r} is not supported; {', '.join(KINDS)} are")
        if found.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise ConfigError(
                f"{where}: partial_rotary_factor is {found['partial_rotary_factor']!r}; only 1 is supported"
            )
        theta = found.get("rope_theta", raw.get("rope_theta", 10_000.0))
        numbers = {"rope_theta": theta} | {name: value for name, value in found.items() if name in _NUMBERS}
        for name in _NEEDED.get(kind, ()):
            numbers.setdefault(name, None)
        for name, value in numbers.items():
            missing = value is None and name in _OPTIONAL
            if not missing and (not isinstance(value, int | float) or isinstance(value, bool)):
                raise ConfigError(f"{where}: rotary embeddings of type {kind} need a number for {name}, not {value!r}")
        scaling = {name: float(value) for name, value in numbers.items() if value is not None}
        # transformers gives a field beside the object precedence over the one within it
        original = raw.get("original_max_position_embeddings") or scaling.get("original_max_position_embeddings")
        scaling["original_max_position_embeddings"] = float(original or max_position)
        if kind == "yarn":  # files often keep the length before the extension
            max_position = max(max_position, int(scaling["original_max_position_embeddings"] * scaling["factor"]))
        truncate = found.get("truncate") is not False
        return RopeConfig(kind, float(theta), head_dim, max_position, scaling, truncate)

    @property
    def attention_factor(self) -> float:
        """The factor of all cosines and sines: YaRN's correction of attention over long texts; otherwise 1."""
        if self.kind != "yarn":
            return 1.0
        given = self.scaling.get("attention_factor")
        if given is not None:
            return given
        factor, scale, all_ = (self.scaling.get(name) for name in ("factor", "mscale", "mscale_all_dim"))
        assert factor is not None
        return _mscale(factor, scale) / _mscale(factor, all_) if scale and all_ else _mscale(factor, 1.0)


_NUMBERS = frozenset({
    "factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor", "attention_factor", "beta_fast",
    "beta_slow", "mscale", "mscale_all_dim",
})  # fmt: skip
_OPTIONAL = _NUMBERS - {"factor", "low_freq_factor", "high_freq_factor"}


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies rotary embedding to `[T, heads, head_dim]` with tables `[T, 1, head_dim]`, halves paired as in GPT-NeoX."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def rotary_table(rope: RopeConfig) -> tuple[Tensor, Tensor]:
    """Returns the cosine and sine of each pair of elements at each position, `[max_position, head_dim / 2]`, float32."""
    angles = torch.outer(torch.arange(rope.max_position, dtype=torch.float32), _frequencies(rope))
    return angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor


def _frequencies(rope: RopeConfig) -> Tensor:
    """Returns the angle per position of each pair, `[head_dim / 2]`, float32."""
    inverse = 1.0 / rope.theta ** (torch.arange(0, rope.head_dim, 2, dtype=torch.float32) / rope.head_dim)
    match rope.kind:
        case "linear":
            return inverse / rope.scaling["factor"]
        case "llama3":
            return _llama3_frequencies(inverse, rope.scaling)
        case "yarn":
            return _yarn_frequencies(inverse, rope)
        case _:
            return inverse


def _llama3_frequencies(inverse: Tensor, scaling: Mapping[str, float]) -> Tensor:
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelength = 2 * math.pi / inverse
    smooth = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    scaled: Tensor = (1 - smooth) * inverse / factor + smooth * inverse
    return scaled


def _yarn_frequencies(inverse: Tensor, rope: RopeConfig) -> Tensor:
    scaling, dim = rope.scaling, rope.head_dim

    def dimension(rotations: float) -> float:
        """The dimension whose pair turns this many times within the original length."""
        length = scaling["original_max_position_embeddings"]
        return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(scaling.get("beta_fast") or 32.0), dimension(scaling.get("beta_slow") or 1.0)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # the ramp must not be a step
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    blended: Tensor = inverse / scaling["factor"] * ramp + inverse * (1 - ramp)
    return blended


def _mscale(factor: float, scale: float | None) -> float:
    return 1.0 if factor <= 1 or scale is None else 0.1 * scale * math.log(factor) + 1.0
