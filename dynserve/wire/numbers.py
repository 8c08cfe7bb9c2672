"""Number types of messages, with bounds that decoding enforces. Most exclude negative numbers, infinity and NaN: every
comparison with NaN is false, and every sum with it is NaN."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Size = Annotated[int, Meta(ge=1, le=2**31 - 1)]
BlockHash = Annotated[int, Meta(ge=0)]  # 64 bits
StreamId = Annotated[int, Meta(ge=0, le=2**63 - 1)]  # the number of an answer on its link
TokenId = Annotated[int, Meta(ge=0, le=2**32 - 1)]
Seconds = Annotated[float, Meta(ge=0, le=1e9)]
Temperature = Annotated[float, Meta(ge=0, le=1e6)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
Factor = Annotated[float, Meta(gt=0, le=1e6)]
Shift = Annotated[float, Meta(ge=-1e6, le=1e6)]
Logprob = Annotated[float, Meta(le=1e6)]  # minus infinity is the probability 0
