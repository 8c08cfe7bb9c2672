"""An estimate of how long a grammar takes to compile, from its text alone.

States with many possible continuations are expensive, because the compiler checks all tokens of the vocabulary in each of
them: a bounded repetition has one state per repetition, and nested bounds multiply. Ten texts of at most 64 characters take
seconds with a vocabulary of 150,000 tokens; thirty without a bound take 50 ms. The estimate is rather too high than too
low: a grammar that it calls heavy is compiled in a process of its own.
"""

from __future__ import annotations

import json
import re
from typing import Any

MAX_TEXT = 32 << 10  # characters; a longer grammar is never light
HEAVY = 1 << 40
NODE, LITERAL, FORMAT = 1 / 16, 1 / 8, 20.0  # states for a part of a schema, a letter, a `format` (an address, a date)
OPTIONAL = 1 / 4  # for each pair of optional parts: the text may continue from before one of them to after the other
_BOUNDS = ("maxLength", "minLength", "maxItems", "minItems", "maxProperties", "minProperties")
_EXPRESSIONS = ("pattern", "regex", "grammar")
_QUANTIFIER = re.compile(r"\{\s*(\d{0,9})\s*(?:,\s*(\d{0,9})\s*)?\}")


def weight(kind: str, text: str, rules: str = "") -> float:
    """Returns a rough number of states. `rules` are those of a `Grammar`. Invalid grammars weigh nothing: the compiler
    refuses them at once."""
    if len(text) > MAX_TEXT:
        return HEAVY
    if kind == "regex":
        return _of_expression(text)
    if kind == "grammar":
        return _of_rules(text)
    if kind == "json" and rules:
        return _of_schema_rules(rules)
    try:
        found = json.loads(text)
        if rules:
            return _of_tag(found, json.loads(rules))
    except (ValueError, RecursionError):
        return 0
    states = _of_json(found)
    # a referenced schema is also used in other places, within bounds that its definition does not show
    return states * max([1, *_all_bounds(found)]) if '"$ref"' in text else states


def _of_json(node: Any) -> float:
    """Returns the states of a schema, or of a structural tag, which contains schemas and expressions."""
    if isinstance(node, list):
        return sum(map(_of_json, node))
    if not isinstance(node, dict):
        return len(node) / 256 if isinstance(node, str) else 0
    states = NODE + sum(_of_json(value) for value in node.values())
    for word in _EXPRESSIONS:
        if isinstance(node.get(word), str):
            states += _of_rules(node[word]) if word == "grammar" else _of_expression(node[word])
    if isinstance(node.get("patternProperties"), dict):
        states += sum(map(_of_expression, node["patternProperties"]))
    if isinstance(node.get("format"), str):
        states += FORMAT
    bounds = _bounds(node)
    return (states + 1) * max(bounds) if bounds else states


def _of_tag(node: Any, with_rules: Any) -> float:
    """Returns the states of a structural tag, from its two forms: with JSON schemas, and with rules instead of them."""
    if isinstance(node, list) and isinstance(with_rules, list):
        return sum(map(_of_tag, node, with_rules))
    if not isinstance(node, dict) or not isinstance(with_rules, dict) or node == with_rules:
        return _of_json(node)
    if node.get("type") == "json_schema" and isinstance(with_rules.get("grammar"), str):
        return _of_schema_rules(with_rules["grammar"])
    return NODE + sum(_of_tag(node[name], with_rules.get(name)) for name in node)


def _of_schema_rules(text: str) -> float:
    """Returns the states of rules that were made from a JSON schema. Other rules that they use have states of their own,
    which bounds do not multiply."""
    return sum(_of_expression(_TEXTS.sub("", line.partition("::=")[2])) + LITERAL for line in text.split("\n"))


def _bounds(node: dict[str, Any]) -> list[int]:
    """Returns the bounds greater than 1. A property may have the name of a bound, too; its value is an object then."""
    return [bound for word in _BOUNDS if isinstance(bound := node.get(word), int) and bound > 1]


def _all_bounds(node: Any) -> list[int]:
    if isinstance(node, list):
        return [bound for item in node for bound in _all_bounds(item)]
    if not isinstance(node, dict):
        return []
    return _bounds(node) + [bound for value in node.values() for bound in _all_bounds(value)]


def _of_rules(text: str) -> float:
    """Returns the states of a grammar's rules. They use each other, so all bounds count as nested."""
    found = _of_expression(_TEXTS.sub("", text)) + LITERAL * len(text) / 2
    bounds = sorted(max(1, int(low or 0), int(high or 0)) for low, high in _QUANTIFIER.findall(_TEXTS.sub("", text)))
    for bound in bounds[:-1]:  # the largest was counted with its operand
        found = min(HEAVY, found * bound)
    return found


_TEXTS = re.compile(r'"(?:[^"\\]|\\.)*"')


def _of_expression(text: str) -> float:
    """Returns the states of a regular expression: one for a set or a class, a fraction of one for a letter; a bound
    multiplies its operand."""
    groups, last = [0.0], 0.0  # of each open group, and of a following quantifier's operand
    at = optional = 0
    while at < len(text):
        char = text[at]
        quantifier = _QUANTIFIER.match(text, at)
        if quantifier is not None:
            times = max(1, int(quantifier[1] or 0), int(quantifier[2] or 0))
            groups[-1] = min(HEAVY, groups[-1] + last * (times - 1))
            last *= times
            optional += not int(quantifier[1] or 0)
            at = quantifier.end()
            continue
        if char == "(":
            groups.append(0.0)
        elif char == ")" and len(groups) > 1:
            last = groups.pop()
            groups[-1] = min(HEAVY, groups[-1] + last)
        elif char == "[":
            end = text.find("]", at + (3 if text.startswith("^", at + 1) else 2))  # a first `]` is in the set
            at = end if end > 0 else len(text)
            last = 1.0
            groups[-1] += last
        elif char == "\\":
            at += 1
            last = 1.0
            groups[-1] += last
        elif char in "*?":
            optional += 1
        elif char not in "+|^$":
            last = 1.0 if char == "." else LITERAL
            groups[-1] += last
        at += 1
    return min(HEAVY, sum(groups) + OPTIONAL * optional**2)
