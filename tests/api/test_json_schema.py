"""Rules of JSON schemas: each text that they match is valid for `jsonschema`, and each valid document can be written."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynserve.api.json_schema import REFUSED, lenient_rules_of, rules_of
from dynserve.errors import BadRequest
from dynserve.executors.torch.grammar_compiler import _import_xgrammar

xgrammar = _import_xgrammar()
END = 256
CLOSING = frozenset(b'"}],')
# a vocabulary of single bytes: every text can be cut into its tokens
COMPILER = xgrammar.GrammarCompiler(
    xgrammar.TokenizerInfo(
        [*(bytes([byte]) for byte in range(256)), b"</s>"], vocab_type=xgrammar.VocabType.RAW, stop_token_ids=[END]
    ),
    max_threads=1, cache_enabled=False,
)  # fmt: skip


def compiled(schema: Any) -> Any:
    return COMPILER.compile_grammar(rules_of(schema, "response_format").text)


def accepts(grammar: Any, text: str) -> bool:
    matcher = xgrammar.GrammarMatcher(grammar)
    return bool(matcher.accept_string(text.encode()) and matcher.is_completed())


def written(grammar: Any, draw: random.Random, longest: int = 400) -> str | None:
    """A text that an engine writes within the grammar by chance; None if it does not come to an end."""
    import torch

    matcher, out = xgrammar.GrammarMatcher(grammar), bytearray()
    bitmask = xgrammar.allocate_token_bitmask(1, END + 1)
    while len(out) < longest:
        matcher.fill_next_token_bitmask(bitmask)
        bits = (bitmask[0][:, None] >> torch.arange(32, dtype=torch.int32)) & 1
        allowed = bits.view(-1)[: END + 1].nonzero().view(-1).tolist()
        assert allowed, f"a dead end after {bytes(out)!r}"
        if END in allowed and draw.random() < 0.5:
            return out.decode("utf-8", "replace")
        # texts come to an end sooner with quotes and brackets, and have no half characters without high bytes
        likely = [byte for byte in allowed if byte in CLOSING or (byte < 128 and draw.random() < 0.2)]
        token = draw.choice(likely or [byte for byte in allowed if byte < 128] or allowed)
        if token == END:
            return out.decode("utf-8", "replace")
        matcher.accept_token(token)
        out.append(token)
    return None


def valid(schema: Any, document: Any) -> bool:
    return jsonschema.Draft202012Validator(schema).is_valid(document)


# documents that a schema allows, and texts that are not among them
CASES: list[tuple[Any, list[str], list[str]]] = [
    (True, ["7", '"x"', "null", "[{}]"], ["", "nul"]),
    ({}, ["7"], ["7 7"]),
    ({"type": "object"}, ["{}", '{"a": 1}', '{"a":[1,{"b":null}]}', "{ }"], ["[]", "7", "{,}"]),
    ({"type": "array"}, ["[]", '[1, "a", []]'], ["{}", "[,]"]),
    ({"type": "object", "required": ["a"]}, ['{"a": 1}', '{"a":1,"b":2}'], ["{}", '{"b":1}', '{"a":1,"a":2}']),
    ({"type": ["integer", "null"]}, ["-12", "null"], ["1.5", '"1"']),
    ({"type": "integer", "minimum": 3, "maximum": 120}, ["3", "99", "120"], ["2", "121", "03"]),
    ({"type": "integer", "exclusiveMinimum": 1.5, "exclusiveMaximum": 4}, ["2", "3"], ["1", "4"]),
    ({"type": "number", "minimum": 0, "exclusiveMaximum": 1.5}, ["0", "1.49", "1", "0.5"], ["1.5", "-1", "2", ""]),
    ({"type": "number", "minimum": -2.5, "maximum": -0.25}, ["-2.5", "-1", "-0.250"], ["-2.51", "-0.24", "0", "1"]),
    ({"minimum": 0, "exclusiveMinimum": True}, ["1", "0.5"], ["0", "-1"]),  # draft 4
    ({"type": "string", "maxLength": 3}, ['"abc"', '"\\"\\"\\\\"', '""', '"\\ud83d\\ude00ab"', '"日本語"'], ['"abcd"', '"\t"']),
    ({"type": "string", "minLength": 2}, ['"ab"', '"\\n\\u0041"'], ['"a"', '""']),
    ({"type": "string", "minLength": 1, "maxLength": 2}, ['"a"', '"ab"'], ['""', '"abc"']),
    ({"type": "string", "pattern": "b"}, ['"abc"', '"b"', '"\\"b"'], ['"ac"', '""']),
    ({"type": "string", "pattern": "^a"}, ['"abc"'], ['"ba"']),
    ({"type": "string", "pattern": "a$|^b"}, ['"xa"', '"bx"'], ['"xb"', '"ax"']),
    ({"type": "string", "pattern": '^"\\\\.$'}, ['"\\"\\\\x"', '"\\"\\\\\\""'], ['""\\x"']),
    ({"type": "string", "pattern": "^[^a-c\\d]{2}$"}, ['"x\\""', '"é\\n"'], ['"a1"', '"x"']),
    ({"type": "string", "pattern": "^\\w+(?:-\\w+)*?$"}, ['"a-b_1"'], ['"a-"']),
    ({"type": "string", "pattern": "^[a-z]+$", "maxLength": 3}, ['"abc"'], ['"abcd"', '""', '"ab1"']),
    ({"type": "string", "pattern": "^[a-z]{2,5}$", "minLength": 1}, ['"ab"'], ['"a"']),
    ({"type": "string", "format": "date"}, ['"2024-02-28"'], ['"2024-02-30"', '"2024-13-01"']),
    ({"type": "string", "format": "date-time"}, ['"2020-01-31T00:00:00Z"'], ['"2020-01-31"', '"2020-01-31T25:00:00Z"']),
    ({"type": "string", "format": "email"}, ['"a.b@c.de"'], ['"a@b"', '"\\"a@c.de"']),
    ({"type": "string", "format": "phone"}, ['"anything \\""'], []),
    ({"type": "array", "minItems": 1}, ["[1]", '["a", 2]'], ["[]"]),
    ({"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 3}, ["[1, 2]", "[1,2,3]"], ["[1]", "[1,2,3,4]"]),
    ({"type": "array", "items": False}, ["[]", "[ ]"], ["[1]"]),
    ({"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}], "items": False}, ["[]", "[1]", '[1, "a"]'], ['[1,"a",2]', '["a"]']),
    ({"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}], "maxItems": 1}, ["[1]", "[]"], ['[1,"a"]']),
    ({"items": [{"type": "integer"}], "additionalItems": {"type": "string"}}, ["[1]", '[1,"a"]'], ['["a"]', "[1,2]"]),  # draft 4
    ({"type": "array", "prefixItems": [{"type": "integer"}], "minItems": 2}, ['[1, "x"]'], ["[1]"]),
    ({"properties": {"a": {"type": "integer"}, "b": {}}, "required": ["b"]}, ['{"a": 1, "b": 2}', '{"b":[]}'], ['{"a":1}', '{"b":1,"c":2}']),
    ({"properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "string"}}, ['{"a": 1, "b": "x"}', '{"b":"x"}', '{"aa":"x"}'], ['{"a":"x"}', '{"b":1}', '{"a":1,"\\u0061":"x"}']),
    ({"properties": {"é\"": {"type": "integer"}}, "additionalProperties": True}, ['{"é\\"": 1, "é": 2}'], ['{"é\\"": "x"}']),
    ({"type": "object", "additionalProperties": False}, ["{}"], ['{"a":1}']),
    ({"type": "object", "maxProperties": 1}, ["{}", '{"a": 1}'], ['{"a":1,"b":2}']),
    ({"type": "object", "minProperties": 1}, ['{"a": 1}'], ["{}"]),
    ({"properties": {c: {"type": "integer"} for c in "abc"}, "minProperties": 2, "maxProperties": 2}, ['{"a":1,"b":2}', '{"b":1,"c":1}'], ["{}", '{"a":1}', '{"a":1,"b":1,"c":1}']),
    ({"properties": {c: {"type": "integer"} for c in "ab"}, "minProperties": 1}, ['{"a":1}', '{"b":1}'], ["{}"]),
    ({"properties": {"a": {}, "b": False}}, ['{"a": 1}', "{}"], ['{"b":1}']),
    ({"type": "object", "patternProperties": {"^x_": {"type": "integer"}}}, ["{}", '{"x_1": 1}'], ['{"y":1}', '{"x_1":"a"}']),
    ({"type": "object", "propertyNames": {"pattern": "^[a-z]+$"}, "additionalProperties": {"type": "integer"}}, ['{"ab": 1}'], ['{"A":1}', '{"a":"x"}']),
    ({"type": "object", "propertyNames": {"enum": ["a", 1]}}, ['{"a": 1}'], ['{"b":1}', "{1:1}"]),
    ({"enum": ["a", 1.5, None, {"x": [1]}]}, ['"a"', "1.5", "null", '{"x": [1]}', '{ "x":[ 1 ] }'], ['"b"', "1"]),
    ({"enum": ["a", "abc", 3], "minLength": 2, "type": "string"}, ['"abc"'], ['"a"', "3"]),
    ({"type": "integer", "enum": [1, 1.5, 2, "a", True], "minimum": 2}, ["2"], ["1", "1.5", '"a"', "true"]),
    ({"const": 0.1}, ["0.1"], ["0.10000000000000001"]),
    ({"const": "\t\""}, ['"\\t\\""'], []),
    ({"allOf": [{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}, {"properties": {"b": {"type": "string"}}, "required": ["b"]}]}, ['{"a": 1, "b": "x"}'], ["7", '{"a":1}', '{"b":"x"}']),
    ({"allOf": [{"minimum": 1}, {"maximum": 3}], "type": "integer"}, ["1", "3"], ["0", "4", '"x"']),
    ({"allOf": [True, {"type": "integer"}]}, ["1"], ['"a"']),
    ({"type": "object", "properties": {"c": {"type": "integer"}}, "anyOf": [{"properties": {"a": {}}, "required": ["a"]}, {"properties": {"b": {}}, "required": ["b"]}]}, ['{"c": 1, "a": 2}', '{"b": 1}'], ['{"c":1}', "7"]),
    ({"type": "integer", "anyOf": [{"minimum": 5}, {"const": 1}]}, ["7", "1"], ["2", '"x"']),
    ({"anyOf": [False, {"type": "integer"}]}, ["1"], ["null"]),
    ({"oneOf": [{"type": "integer"}, {"type": "string"}]}, ["1", '"a"'], ["null"]),
    ({"oneOf": [{"properties": {"k": {"const": kind}, kind: {"type": "integer"}}, "required": ["k"]} for kind in "ab"]}, ['{"k": "a", "a": 1}', '{"k":"b"}'], ['{"k":"a","b":1}', "{}"]),
    ({"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"type": "integer"}}}, ["1"], ['"a"']),
    ({"$ref": "#/$defs/a%20b", "$defs": {"a b": {"type": "integer"}}, "minimum": 3}, ["3"], ["2"]),
    ({"$ref": "#/$defs/l/anyOf/1", "$defs": {"l": {"anyOf": [{}, {"type": "null"}]}}}, ["null"], ["1"]),
    ({"type": "object", "properties": {"n": {"$ref": "#"}, "v": {"type": "integer"}}, "required": ["v"]}, ['{"n": {"v": 1}, "v": 2}', '{"v":1}'], ['{"n":{},"v":1}']),
    ({"anyOf": [{"$ref": "#/$defs/endless"}, {"type": "integer"}], "$defs": {"endless": {"properties": {"x": {"$ref": "#/$defs/endless"}}, "required": ["x"]}}}, ["1"], ["{}"]),
    ({"properties": {"p": {"properties": {"title": {"type": "integer"}}}, "q": {"properties": {"title": {"type": "string"}}}}}, ['{"p": {"title": 1}, "q": {"title": "x"}}'], ['{"p":{"title":1},"q":{"title":1}}']),
    ({"type": "object", "properties": {"a": {}}, "unevaluatedProperties": False, "allOf": [{"properties": {"b": {}}}]}, ['{"a": 1, "b": 2}'], ['{"c":1}']),
    ({"title": "t", "description": "d", "default": 1, "x-own": {}, "nullable": True, "type": "integer"}, ["1"], ["null"]),
    ({"oneOf": [{"type": "object", "properties": {"k": {"const": "a"}}, "required": ["k"]}, {"properties": {"k": {"const": 1}}, "required": ["k"]}]}, ['{"k": "a"}', '{"k":1}'], ["7", "{}"]),
    ({"type": "object", "oneOf": [{"properties": {"k": {"const": k}}, "required": ["k"]} for k in (True, 1)]}, ['{"k": true}', '{"k":1}'], ["{}"]),
    ({"required": ["a"], "unevaluatedProperties": {"type": "integer"}}, ['{"a": 1}', '{"a":1,"b":2}'], ['{"a":"x"}', '{"a":1,"b":"x"}']),
    ({"type": ["integer", "null"], "multipleOf": 1}, ["3", "null"], ["3.5"]),
    ({"type": "number", "multipleOf": 1, "minimum": 0}, ["3", "0"], ["3.5", "-1"]),
    ({"type": "number", "minimum": -1.7976931348623157e308, "maximum": 3.4028234663852886e38}, ["-2.5", "3"], ['"a"']),
    ({"enum": [1e300, 3, 2**53 + 1], "maximum": 2**53}, ["3"], ["1e+300", str(2**53 + 1)]),
    ({"enum": ["a", "bc"], "format": "date"}, ['"a"'], ['"2020-01-01"']),
    ({"type": "array", "contains": {"const": 1}, "minContains": 0, "items": {"type": "integer"}}, ["[2]"], ['["a"]']),
    ({"allOf": [{"const": 1}, {"enum": [True, 1]}]}, ["1"], ["true"]),
    ({"type": "object", "properties": {"n" * 300: {"type": "integer"}}, "additionalProperties": True}, ["{}", '{"' + "n" * 300 + '": 1}'], ['{"a":1}']),
    ({"type": "string", "pattern": "^\\s[^\\d]\\W$"}, ['" x-"', '" é-"'], ['" 1-"', '"\ufeffx-"', '" xé"', '" ٣-"']),
    ({"type": "string", "pattern": "^[\\D]\\S$"}, ['"xy"'], ['"٣y"', '"x "', '"x\u00a0"', '"x\ufeff"']),
    ({"type": "integer", "then": {"minimum": 9}, "minContains": 3, "dependentRequired": {}, "not": False}, ["1"], ['"x"']),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "good", "bad"), CASES, ids=[json.dumps(case[0])[:60] for case in CASES])
def test_rules_match_what_a_schema_allows(schema: Any, good: list[str], bad: list[str]) -> None:
    grammar = compiled(schema)
    for text in good:
        assert accepts(grammar, text), text
    for text in bad:
        assert not accepts(grammar, text), text


@pytest.mark.parametrize("schema", [case[0] for case in CASES], ids=[json.dumps(case[0])[:60] for case in CASES])
def test_whatever_an_engine_writes_within_rules_is_valid(schema: Any) -> None:
    grammar, draw, ended = compiled(schema), random.Random(7), 0
    current = json.loads(json.dumps(schema).replace('"exclusiveMinimum": true', '"exclusiveMinimum": 0'))
    if isinstance(current, dict) and isinstance(current.get("items"), list):
        current = {"prefixItems": current["items"], "items": current["additionalItems"]}
    for _ in range(15):
        text = written(grammar, draw)
        if text is not None:
            ended += 1
            assert valid(current, json.loads(text)), text
    assert ended


UNSUPPORTED: dict[str, tuple[Any, str]] = {
    "not": ({"type": "object", "properties": {"a": {"not": {"type": "null"}}}}, r"properties\.a\.not$"),
    "if": ({"if": {"type": "integer"}, "then": {"minimum": 1}}, "if$"),
    "uniqueItems": ({"type": "array", "uniqueItems": True}, "uniqueItems$"),
    "contains": ({"properties": {"a": {"items": {"contains": {"type": "integer"}}}}}, r"properties\.a\.items\.contains$"),
    "multipleOf": ({"type": "integer", "multipleOf": 3}, "multipleOf$"),
    "dependentRequired": ({"dependentRequired": {"a": ["b"]}}, "dependentRequired$"),
    "overlapping oneOf": ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf: its branches overlap"),
    "pattern beside length": ({"type": "string", "pattern": "a", "minLength": 3}, "pattern: it cannot be combined"),
    "looking ahead": ({"type": "string", "pattern": "^(?=a).*$"}, "pattern: looking ahead"),
    "word boundaries": ({"pattern": r"\bfoo"}, r"pattern: \\b is not supported"),
    "groups again": ({"pattern": r"(a)\1"}, r"pattern: \\1 is not supported"),
    "inner anchors": ({"pattern": "a(^b)"}, r"pattern: \^ is supported at the ends only"),
    "long strings": ({"type": "string", "maxLength": 100_000}, "maxLength: over 1,000"),
    "free names": ({"type": "object", "minProperties": 2}, "minProperties: over 1, where names are free"),
    "other patterns": ({"patternProperties": {"^a": {}, "^b": {}}}, "patternProperties: only one expression"),
    "enum beside pattern": ({"enum": ["a"], "pattern": "b"}, "pattern: beside enum or const"),
    "remote": ({"$ref": "https://x.y/z"}, r"\$ref: only references within the schema"),
    "missing": ({"$ref": "#/$defs/x"}, r"\$ref: there is no '#/\$defs/x'"),
    "anchor": ({"$ref": "#x"}, r"\$ref: anchors are not supported"),
    "types by convention": (
        {"oneOf": [{"properties": {"a": {}}}, {"type": "string"}]}, "oneOf: its branches overlap"),
    "words of two types": ({"oneOf": [
        {"properties": {"k": {"const": at}}, "required": ["k"], "minLength": 1} for at in range(2)]}, "oneOf: its branches overlap"),
    "names of known members": (
        {"properties": {"a": {}}, "additionalProperties": False, "propertyNames": {"maxLength": 0}}, "propertyNames: beside"),
    "many digits": ({"type": "number", "minimum": 1e100}, "minimum: it has too many digits"),
    "bases": ({"$defs": {"a": {"$id": "https://x.y/a"}}, "$ref": "#/$defs/a"}, r"\$ref: beside an \$id"),
    "no schema": ({"$ref": "#/required", "required": ["a"]}, r"\$ref: '#/required' is not a schema"),
    "Python's repetition": ({"pattern": "a{,3}"}, r"pattern: \{,3\} is not supported"),
    "long repetition": ({"pattern": "a{0000000000000}"}, r"pattern: \{0000000000000\} is not supported"),
    "range of classes": ({"pattern": r"[+-\d]"}, "pattern: a class cannot end a range"),
    "hexadecimal": ({"pattern": r"\x+1"}, "needs hexadecimal digits"),
    "octal": ({"pattern": r"\01"}, r"\\0 is not supported"),
    "misspelt": ({"type": "string", "minlength": 3}, "minlength: did you mean minLength"),
    "cousins": ({"allOf": [{"properties": {"a": {}}, "unevaluatedProperties": False}, {"properties": {"b": {}}}]},
                r"unevaluatedProperties: it stands in one of two"),
    "itself": ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a", "type": "object"}}}, r"\$ref: it refers to itself"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_word_that_rules_cannot_hold_is_refused_with_its_place(name: str) -> None:
    schema, message = UNSUPPORTED[name]
    with pytest.raises(BadRequest, match=f"response_format: a grammar cannot hold an answer to .*{message}"):
        rules_of(schema, "response_format")


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "nope"}, "type: 'nope' is not a type"),
        ({"properties": {"a": {"type": 3}}}, r"properties\.a\.type: it is not a type or a list of types"),
        ({"minLength": -1}, "minLength: it is not a whole number"),
        ({"minimum": "1"}, "minimum: it is not a number"),
        ({"properties": {"a": 3}}, r"properties\.a is not a JSON schema"),
        ({"anyOf": []}, "anyOf"),
        (False, "no finite JSON text can satisfy this schema"),
        ({"$ref": "#"}, "no finite JSON text"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "no finite JSON text"),
        ({"type": "object", "minProperties": 1, "maxProperties": 0}, "no finite JSON text"),
        ({"minimum": float("inf")}, "JSON has no NaN and no Infinity"),
        ({"required": "a"}, "required: it is not a list of names"),
        ({"properties": ["a"]}, "properties: it is not an object of schemas"),
        ({"uniqueItems": "yes"}, "uniqueItems: it is not true or false"),
        ({"allOf": [3, {}]}, "allOf has a part that is not a JSON schema"),
        ({"properties": {"p" * 500: {"type": "x"}}}, "…p{195}.type: 'x' is not a type"),
        ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "no finite JSON text"),
        ({"type": []}, "no finite JSON text"),
        ({"allOf": [{"type": "integer"}, {"type": "string"}]}, "no finite JSON text"),
    ],
)
def test_a_schema_without_answers_is_refused(schema: Any, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        rules_of(schema, "response_format")


def test_a_schema_that_stands_for_too_many_others_is_refused() -> None:
    branches = [{"properties": {f"p{at}": {"type": "integer"}}, "required": [f"p{at}"]} for at in range(9)]
    schema = {
        "allOf": [{"anyOf": branches}] * 1 + [{"anyOf": [{**b, "title": str(n)} for b in branches]} for n in range(6)]
    }
    with pytest.raises(BadRequest, match="stands for too many rules"):
        rules_of(schema, "response_format")


def chain(length: int) -> Any:
    links = {f"d{at}": {"properties": {"next": {"$ref": f"#/$defs/d{at + 1}"}}} for at in range(length)}
    return {"$defs": {**links, f"d{length}": {}}, "$ref": "#/$defs/d0", "type": "object"}


@pytest.mark.parametrize(
    "schema",
    [
        chain(400),  # nested through references
        {"anyOf": [{"minLength": 1, "title": str(at)} for at in range(1500)], "enum": [str(at) for at in range(1500)]},
        {"oneOf": [{"const": at} for at in range(3900)]},
        {"type": "object", "properties": {f"p{at}": {"maxLength": 900 - at, "type": "string", "pattern": "^(a|b)*$"} for at in range(9)},
         "additionalProperties": {"type": "string", "minLength": 1000}, "allOf": [{"minLength": at} for at in range(900)] * 5},
    ],
    ids=["references", "constants", "pairs", "parts"],
)  # fmt: skip
def test_the_work_on_a_schema_is_bounded(schema: Any) -> None:
    with pytest.raises(BadRequest, match="stands for too many rules"):
        rules_of(schema, "response_format")
    made = lenient_rules_of({"type": "object", "properties": {"a": schema}, "$defs": schema.get("$defs", {})}, "tools")
    assert made.dropped[-1] == "the whole schema" and accepts(COMPILER.compile_grammar(made.text), '{"a": 1}')


def test_words_without_a_value_say_nothing() -> None:
    assert accepts(compiled({"type": "string", "maxLength": None, "enum": None, "not": None}), '"a"')


def test_tools_lose_only_the_words_that_rules_cannot_hold() -> None:
    schema: Any = {"type": "object", "required": ["a"], "properties": {
        "a": {"type": "array", "uniqueItems": True, "items": {"type": "integer", "not": {"const": 3}}},
        "b": {"type": "string", "pattern": "(?=a)"}, "c": {"oneOf": [{}, {"type": "null"}]}}}  # fmt: skip
    made = lenient_rules_of(schema, "tools")
    assert sorted(made.dropped) == [
        "properties.a.items.not", "properties.a.uniqueItems", "properties.b.pattern", "properties.c.oneOf",
    ]  # fmt: skip
    grammar = COMPILER.compile_grammar(made.text)
    assert accepts(grammar, '{"a": [3, 3], "b": "", "c": null}') and not accepts(grammar, '{"a": ["x"]}')
    impossible = lenient_rules_of({"type": "object", "required": ["a"], "properties": {"a": False}}, "tools")
    assert impossible.dropped == ["the whole schema"] and accepts(COMPILER.compile_grammar(impossible.text), "{}")


# random schemas of the supported words, and random documents

NAMES = st.sampled_from(["a", "b", "title", "ä", 'q"', ""])
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-30, 30), st.sampled_from(["", "a", "ab", 'é"', "x\ny"]))


def bounded(low: str, high: str, values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional={low: values, high: values})


def strings() -> st.SearchStrategy[Any]:
    patterns = st.sampled_from(["^[a-c]+$", "b", "^a", "c$", "^(a|bc)*$", "^.{1,3}$", '"', "^[^a]*$", "a|^b"])
    return st.one_of(
        bounded("minLength", "maxLength", st.integers(0, 4)).map(lambda b: {"type": "string"} | b),
        patterns.map(lambda p: {"type": "string", "pattern": p}),
    )


def numbers() -> st.SearchStrategy[Any]:
    values = st.one_of(st.integers(-25, 25), st.sampled_from([-1.5, 0.25, 0.5, 9.99, -0.05]))
    return st.fixed_dictionaries(
        {"type": st.sampled_from(["integer", "number"])},
        optional=dict.fromkeys(["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"], values),
    )


def objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.fixed_dictionaries(
        {"type": st.just("object"), "properties": st.dictionaries(NAMES, inner, min_size=1, max_size=3)},
        optional={
            "required": st.lists(NAMES, unique=True, max_size=2), "additionalProperties": st.one_of(st.booleans(), inner),
            "maxProperties": st.integers(0, 4),
        },
    )  # fmt: skip


def arrays(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.fixed_dictionaries(
        {"type": st.just("array")},
        optional={
            "items": inner, "prefixItems": st.lists(inner, min_size=1, max_size=2), "minItems": st.integers(0, 2),
            "maxItems": st.integers(0, 3),
        },
    )  # fmt: skip


def combined(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    lists = st.lists(inner, min_size=1, max_size=2)
    return st.one_of(
        lists.map(lambda branches: {"anyOf": branches}),
        lists.map(lambda branches: {"allOf": branches}),
        st.tuples(inner, lists).map(
            lambda pair: {**pair[0], "anyOf": pair[1]} if isinstance(pair[0], dict) else pair[0]
        ),
        lists.map(lambda branches: {"oneOf": branches}),
    )


BASIC = st.one_of(
    st.just({}), st.booleans(), strings(), numbers(), st.just({"type": "null"}), st.just({"type": ["string", "boolean"]}),
    st.lists(SCALARS, min_size=1, max_size=3).map(lambda values: {"enum": values}), SCALARS.map(lambda value: {"const": value}),
)  # fmt: skip
SCHEMAS = st.recursive(BASIC, lambda inner: st.one_of(objects(inner), arrays(inner), combined(inner)), max_leaves=5)
DOCUMENTS = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(NAMES, inner, max_size=3)),
    max_leaves=6,
)


def candidates(schema: Any, draw: random.Random) -> Iterator[Any]:
    """Documents that have a chance to be valid."""
    if not isinstance(schema, dict):
        yield draw.choice([1, "a", None, [], {}])
        return
    for word in ("anyOf", "oneOf", "allOf"):
        for branch in schema.get(word, ()):
            yield from candidates(branch, draw)
    yield from schema.get("enum", [])
    if "const" in schema:
        yield schema["const"]
    kinds = schema.get("type", [])
    for kind in [kinds] if isinstance(kinds, str) else kinds:
        match kind:
            case "string":
                yield from ("", "a", "ab", "abc", 'b"', "é", "ca", "bcbc", "a\nb")
            case "integer" | "number":
                yield from (0, 1, -1, 7, 24, -20, *((0.5, 0.25, 9.5, -1.25) if kind == "number" else ()))
            case "array":
                items = [*schema.get("prefixItems", ()), *[schema.get("items", {})] * 2]
                for size in range(len(items) + 1):
                    yield [draw.choice(list(candidates(item, draw)) or [1]) for item in items[:size]]
            case "object":
                members = {n: list(candidates(s, draw)) or [1] for n, s in schema.get("properties", {}).items()}
                for _ in range(4):
                    yield {
                        n: draw.choice(c)
                        for n, c in members.items()
                        if n in schema.get("required", ()) or draw.random() < 0.5
                    }
            case "boolean":
                yield from (True, False)
            case "null":
                yield None


def closed(schema: Any, document: Any) -> bool:
    """Whether a document has no members that the convention about closed objects keeps out. They are compared by writing the
    convention into the schema."""
    return valid(explicit(schema), document)


def explicit(schema: Any) -> Any:
    if isinstance(schema, list):
        return [explicit(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    made = {w: ({n: explicit(s) for n, s in g.items()} if w == "properties" else g if w in ("enum", "const") else explicit(g))
            for w, g in schema.items()}  # fmt: skip
    if isinstance(schema.get("properties"), dict) and schema["properties"] and "additionalProperties" not in schema:
        names = [*schema["properties"], *schema.get("required", [])]
        made["propertyNames"] = {"enum": names}
    return made


def has_combinator(schema: Any) -> bool:
    return re.search(r'"(anyOf|allOf|oneOf)"', json.dumps(schema)) is not None


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(SCHEMAS, st.lists(DOCUMENTS, max_size=5), st.integers(0, 2**32))
def test_random_schemas_allow_what_jsonschema_allows(schema: Any, documents: list[Any], seed: int) -> None:
    draw = random.Random(seed)
    try:
        grammar = compiled(schema)
    except BadRequest as refused:
        text = str(refused)
        assert "a grammar cannot hold" in text or "no finite JSON text" in text, text
        if "no finite" in text and not has_combinator(schema):
            assert not any(valid(schema, one) for one in [*documents, *candidates(schema, draw)])
        return
    for document in [*documents, *candidates(schema, draw)]:
        # members in the order of the schema, which is not that of a document drawn at random
        text = json.dumps(document, ensure_ascii=False)
        if not valid(schema, document):
            assert not accepts(grammar, text), text
        elif closed(schema, document) and in_order(schema, document):
            assert accepts(grammar, text), text
    for _ in range(3):
        found = written(grammar, draw, 150)
        assert found is None or valid(schema, json.loads(found)), found


def in_order(schema: Any, document: Any) -> bool:
    """Whether nothing in a document depends on an order of members that combined schemas do not give."""
    if isinstance(document, dict) and len(document) > 1:
        if has_combinator(schema) or not isinstance(schema, dict):
            return False
        known = [*schema.get("properties", {})]
        known += [name for name in schema.get("required", []) if name not in known]
        places = [known.index(name) if name in known else len(known) for name in document]
        if places != sorted(places):
            return False
    if isinstance(document, dict) and isinstance(schema, dict):
        rest = schema.get("additionalProperties", {})
        return all(in_order(schema.get("properties", {}).get(name, rest), inner) for name, inner in document.items())
    if isinstance(document, list):
        return not any(isinstance(inner, dict) and len(inner) > 1 for inner in document)
    return True


def test_every_word_that_is_refused_is_one_of_json_schema() -> None:
    vocabulary = {word for draft in (jsonschema.Draft202012Validator, jsonschema.Draft7Validator, jsonschema.Draft4Validator,
                                     jsonschema.Draft3Validator) for word in draft.VALIDATORS}  # fmt: skip
    assert REFUSED - vocabulary <= {"minContains", "maxContains", "then", "else", "$recursiveRef"}
