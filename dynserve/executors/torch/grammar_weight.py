"""An estimate of how long a grammar takes to compile, from its text alone.

What takes long is repetition with a bound: each of its steps is a state of its own, bounds within bounds multiply, and
for each state all tokens of the vocabulary are looked at. Ten texts of at most 64 characters take seconds with a
vocabulary of 150,000 tokens; thirty without a bound take 50 ms.
"""

from __future__ import annotations

import json
import re
from typing import Any

MAX_TEXT = 32 << 10  # characters; a longer grammar is never light
_BOUNDS = ("maxLength", "minLength", "maxItems", "minItems", "maxProperties", "minProperties")
_REGEX_BOUND = re.compile(r"\{(\d+)?(?:,(\d*))?\}")
_REGEX_WORDS = ("pattern", "regex")


def weight(kind: str, text: str) -> int:
    """States, roughly. Grammars that cannot be read weigh nothing: the compiler refuses them at once."""
    if len(text) > MAX_TEXT:
        return len(text)
    if kind in ("regex", "grammar"):
        return _of_regex(text)
    try:
        return _of_json(json.loads(text))
    except (ValueError, RecursionError):
        return 0


def _of_json(node: Any) -> int:
    """Of a schema, or of a structural tag, which has schemas and expressions in it."""
    if isinstance(node, list):
        return sum(map(_of_json, node))
    if not isinstance(node, dict):
        return len(node) // 16 if isinstance(node, str) else 0
    within = sum(_of_json(value) for word, value in node.items() if word not in _BOUNDS)
    expressions = sum(_of_regex(node[word]) for word in _REGEX_WORDS if isinstance(node.get(word), str))
    if isinstance(node.get("grammar"), str):
        expressions += _of_regex(node["grammar"])
    bounds = [bound for word in _BOUNDS if isinstance(bound := node.get(word), int)]
    return (within + expressions + 1) * max(1, *bounds) if bounds else within + expressions + 1


def _of_regex(text: str) -> int:
    """As if all bounds were within each other."""
    found = 1
    for low, high in _REGEX_BOUND.findall(text):
        found *= max(1, int(low[:6] or 0), int(high[:6] or 0))
        if found > 1 << 40:
            break
    return found + len(text) // 16
