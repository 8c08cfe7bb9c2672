from __future__ import annotations

from typing import Any

from ._contract import CONTRACT, dataclass_of


class _Disaggregated:
    __slots__ = ()

    def __post_init__(self: Any) -> None:
        if self.request_type is not None:
            self.request_type = self.request_type.lower()
            if self.request_type not in CONTRACT["request_types"]:
                raise ValueError(f"Invalid request type: {self.request_type}")


DisaggregatedParams = dataclass_of("DisaggregatedParams", _Disaggregated, slots=True)
DisaggregatedParams.__module__ = __name__
