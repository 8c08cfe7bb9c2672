"""What `contract.json` says of the version that this double plays: 1.3.0rc29, or 1.2.1 or 1.2.0 by TRTLLM_DOUBLE_VERSION."""

from __future__ import annotations

import json
import os
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import Any

CONTRACT: dict[str, Any] = json.loads((Path(__file__).parent.parent / "contract.json").read_text())
VERSION = os.environ.get("TRTLLM_DOUBLE_VERSION", CONTRACT["pin"])
OLD = VERSION.startswith("1.2")


def here(owner: str, names: dict[str, Any] | list[str]) -> Any:
    """Those of `names` that this version has."""
    gone = list(CONTRACT["not_in_1.2"].get(owner, [])) if OLD else []
    if VERSION == "1.2.0":
        gone += CONTRACT["not_in_1.2.0"].get(owner, [])
    if isinstance(names, dict):
        here_only = CONTRACT["only_in_1.2"].get(owner, {}) if OLD else {}
        return {name: value for name, value in names.items() if name not in gone} | here_only
    return [name for name in names if name not in gone]


def dataclass_of(name: str, base: type = object, *, kw_only: bool = True, slots: bool = False) -> type:
    """A dataclass with the contract's fields and defaults."""
    made = []
    for key, default in here(name, CONTRACT["dataclasses"][name]).items():
        made.append((key, Any) if default == "..." else (key, Any, field(default=default)))
    return make_dataclass(name, made, bases=(base,), kw_only=kw_only, slots=slots)
