"""JSON schemas as rules in EBNF: every text that the rules match is valid; what they cannot express is refused by name.

Compilers of JSON schemas drop the words that they do not know, or that stand beside others, without a word. So the rules
are made here. Where a schema leaves something open, these conventions hold:

- Members come in the order of `properties`, and further ones behind them.
- An object with `properties` is closed unless `additionalProperties` opens it, as models are used to; one without is open.
- A schema without `type` has those types that its words are about, or any type if it has no such words.
- `format` is a hint: date, time, date-time, uuid, ipv4, ipv6, email, hostname, uri and duration are followed, others are
  ignored, and so are all of them beside a pattern or a length.

Source of the words: JSON Schema 2020-12; draft 4's forms of bounds and of lists of items are read, too.
"""

from __future__ import annotations

import json
import operator
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal
from hashlib import blake2b
from typing import Any, NamedTuple
from urllib.parse import unquote

from dynserve.api import number_rules
from dynserve.api.number_rules import Bounds
from dynserve.api.patterns import UnsupportedPattern, string_of
from dynserve.api.rules import IMPOSSIBLE, Chars, Node, Repeat, Rule, Rules, Text, TooManyRules, choice, sequence
from dynserve.api.string_rules import MAX_REPEATS, Strings
from dynserve.errors import BadRequest

Schema = dict[str, Any] | bool
MAX_SCHEMAS = 4_000  # that are made from one, with those of merged and shared parts
MAX_WHITESPACE = 32  # JSON allows any amount; a degenerating model would fill its context with it
KEPT_CHARACTERS = 16 << 20  # of rules that are kept for further requests
MAX_COUNT = 10_000  # of items or members
MAX_NAMES = 2_000  # characters of the names that the other names of an open object must not be
MAX_NAME = 200
MAX_PLACE = 200  # characters of a place in a message
MAX_BOUND = Decimal("1e40")
ENDLESS = 1e300  # bounds beyond it are those of the type of a number in some language: no bounds

TYPES = ("object", "array", "string", "number", "boolean", "null")
_OBJECT = frozenset({"properties", "required", "additionalProperties", "minProperties", "maxProperties",
                     "patternProperties", "propertyNames", "unevaluatedProperties"})  # fmt: skip
_ARRAY = frozenset(
    {"items", "prefixItems", "minItems", "maxItems", "additionalItems", "unevaluatedItems", "uniqueItems"}
)
_STRING = frozenset({"minLength", "maxLength", "pattern", "format"})
_NUMBER = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"})
_COMBINATORS = ("$ref", "allOf", "anyOf", "oneOf")
_VALUES = frozenset({"type", "enum", "const"})
_KNOWN = _OBJECT | _ARRAY | _STRING | _NUMBER | {*_COMBINATORS} | _VALUES
# words that a grammar cannot hold an answer to
REFUSED = frozenset({
    "not", "if", "then", "else", "contains", "minContains", "maxContains", "dependentRequired", "dependentSchemas",
    "dependencies", "$dynamicRef", "$recursiveRef", "divisibleBy", "disallow", "extends",
})  # fmt: skip
_COMPARED: dict[str, Callable[[Any, Any], bool]] = {
    "minimum": operator.ge, "exclusiveMinimum": operator.gt, "maximum": operator.le, "exclusiveMaximum": operator.lt,
}  # fmt: skip
_BY_TYPE = {"object": _OBJECT, "array": _ARRAY, "string": _STRING, "number": _NUMBER, "integer": _NUMBER}
_SPELLED = {word.lower(): word for word in _KNOWN | REFUSED}
_DATE = r"[1-9]\d{3}-((0[13578]|1[02])-(0[1-9]|[12]\d|3[01])|(0[469]|11)-(0[1-9]|[12]\d|30)|02-(0[1-9]|1\d|2[0-8]))"
_TIME = r"([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d{1,9})?(Z|[+\-]([01]\d|2[0-3]):[0-5]\d)"
_BYTE = r"(25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_LABEL = r"[A-Za-z0-9]([A-Za-z0-9\-]{0,61}[A-Za-z0-9])?"
_ATOM = r"[A-Za-z0-9_+\-]+"
_FORMATS = {
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DATE}T{_TIME}$",
    "uuid": r"^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$",
    "ipv4": rf"^({_BYTE}\.){{3}}{_BYTE}$",
    "ipv6": r"^([0-9a-f]{1,4}:){7}[0-9a-f]{1,4}$|^::$|^([0-9a-f]{1,4}:){1,6}:[0-9a-f]{1,4}$",
    "email": rf"^{_ATOM}(\.{_ATOM})*@({_LABEL}\.)+[A-Za-z]{{2,63}}$",
    "hostname": rf"^{_LABEL}(\.{_LABEL})*$",
    "uri": r"^[A-Za-z][A-Za-z0-9+.\-]*:(//[A-Za-z0-9.\-]+(:\d{1,5})?)?[A-Za-z0-9._~!$&'()*+,;=:@/?\-]*$",
    "duration": r"^P(\d+W|\d+Y(\d+M(\d+D)?)?|\d+M(\d+D)?|\d+D|(\d+D)?T(\d+H(\d+M(\d+S)?)?|\d+M(\d+S)?|\d+S))$",
}


class SchemaRules(NamedTuple):
    """The rules of a schema. `dropped`: words that were left out, where that is allowed, with their places."""

    text: str
    dropped: list[str]


def rules_of(schema: Any, param: str) -> SchemaRules:
    """Returns rules for the JSON texts that a schema allows. `param` is the request's field.

    Raises:
        BadRequest: the schema is not valid, or has a word that rules cannot hold an answer to; with word and place.
    """
    return _KEPT.get((_text(schema, param), param, "strict"), lambda: _rules_of(schema, param))


def lenient_rules_of(schema: dict[str, Any], param: str) -> SchemaRules:
    """Returns rules for the objects that a schema allows, without the words that rules cannot hold an answer to. Raises
    BadRequest if the schema is not valid."""
    return _KEPT.get((_text(schema, param), param, "lenient"), lambda: _lenient_rules_of(schema, param))


def _text(schema: Any, param: str) -> str:
    try:
        return json.dumps(schema, allow_nan=False)
    except ValueError:
        raise BadRequest(f"{param}: JSON has no NaN and no Infinity, which this schema has", param=param) from None


class _Kept:
    """The rules that were made last, up to `KEPT_CHARACTERS` in total: clients send the same schemas again and again."""

    def __init__(self) -> None:
        self._rules: OrderedDict[tuple[str, ...], SchemaRules] = OrderedDict()
        self._size = 0
        self._lock = threading.Lock()  # requests are prepared in several threads

    def get(self, key: tuple[str, ...], make: Callable[[], SchemaRules]) -> SchemaRules:
        with self._lock:
            if (found := self._rules.get(key)) is not None:
                self._rules.move_to_end(key)
                return found
        made = make()
        with self._lock:
            if key not in self._rules:
                self._rules[key] = made
                self._size += len(key[0]) + len(made.text)
            while self._size > KEPT_CHARACTERS:
                (text, *_), dropped = self._rules.popitem(last=False)
                self._size -= len(text) + len(dropped.text)
        return made


_KEPT = _Kept()


def _rules_of(schema: Any, param: str) -> SchemaRules:
    writer = _Writer(schema, param, strict=True)
    try:
        text = writer.rules.text(writer.value(schema, ""))
    except (TooManyRules, RecursionError):
        raise BadRequest(f"{param}: this schema stands for too many rules; simplify it", param=param) from None
    if text is None:
        raise BadRequest(f"{param}: no finite JSON text can satisfy this schema", param=param)
    return SchemaRules(text, [])


def _lenient_rules_of(schema: dict[str, Any], param: str) -> SchemaRules:
    writer = _Writer(schema, param, strict=False)
    try:
        text = writer.rules.text(writer.value(schema, ""))
    except (TooManyRules, RecursionError):
        text = None
    if text is None:  # no object can satisfy it, or its rules are too many
        return SchemaRules(rules_of({"type": "object"}, param).text, ["the whole schema"])
    return SchemaRules(text, writer.dropped)


class _Unsupported(Exception):
    """A word that a grammar cannot express in its place."""

    def __init__(self, place: str, word: str, reason: str = "") -> None:
        self.place, self.word = _short(_joined(place, word)), word
        super().__init__(f"{self.place}{': ' + reason if reason else ''}")


class _Writer:
    """Makes the rules of one schema."""

    def __init__(self, root: Any, param: str, *, strict: bool) -> None:
        self._root, self._param, self._strict = root, param, strict
        self.rules = Rules()
        self.strings = Strings(self.rules)
        self.dropped: list[str] = []
        self._made: dict[bytes, Rule] = {}  # by a hash of the schema's JSON
        self._resolving: list[str] = []  # references that are being merged
        self._count = 0
        self._bases: bool | None = None  # whether a part of the schema has an $id, once it matters
        self._space = self.rules.add("ws", Repeat(Chars(" \\n\\t\\r"), 0, MAX_WHITESPACE))
        self._any_value: Rule | None = None

    def value(self, schema: Any, place: str) -> Node:
        """The rule for a schema. Equal schemas share one, so that a schema can refer to itself."""
        self._spend(1)
        if schema is True or schema == {}:
            return self._anything()
        if schema is False:
            return IMPOSSIBLE
        if not isinstance(schema, dict):
            message = f"{self._param}: {_short(place) or 'the schema'} is not a JSON schema"
            raise BadRequest(message, param=self._param)
        # in order: the order of properties is that of members
        text = json.dumps(schema)
        self._spend(len(text) // 4096)
        key = blake2b(text.encode(), digest_size=16).digest()
        if key not in self._made:
            name = self.rules.reserve()
            self._made[key] = Rule(name)
            self.rules.add(name, self._checked(schema, place))
        return self._made[key]

    def _spend(self, steps: int) -> None:
        """Counts the work on a schema, in schemas that are made from it. Raises TooManyRules beyond the bound."""
        self._count += steps
        if self._count > MAX_SCHEMAS:
            raise TooManyRules

    def _checked(self, schema: dict[str, Any], place: str) -> Node:
        """The body of a schema's rule. Where a word cannot be expressed, it is left out or refused."""
        while True:
            try:
                return self._body(self._plain(schema, place), place)
            except _Unsupported as found:
                if self._strict:
                    message = f"{self._param}: a grammar cannot hold an answer to {found}"
                    raise BadRequest(message, param=self._param) from None
                self._spend(1 + len(schema) // 32)
                self.dropped.append(found.place)
                # a word of a branch goes with the word that combines the branches
                wrong = next((word for word in (found.word, *_COMBINATORS) if word in schema), None)
                if wrong is None:
                    return self._anything()
                schema = _without(schema, wrong)

    def _plain(self, schema: dict[str, Any], place: str) -> dict[str, Any]:
        """The schema's words of today's draft, without annotations."""
        plain: dict[str, Any] = {}
        for word, given in schema.items():
            if given is None and word != "const":  # as clients write words that they have nothing to say with
                continue
            if word in REFUSED:
                if not _without_effect(word, schema):
                    raise _Unsupported(place, word)
            elif word in _KNOWN:
                plain[word] = given
            elif (meant := _SPELLED.get(word.lower())) is not None:
                raise _Unsupported(place, word, f"did you mean {meant}?")
        for bound, exclusive in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
            # draft 4
            if isinstance(plain.get(exclusive), bool) and plain.pop(exclusive) and bound in plain:
                plain[exclusive] = plain.pop(bound)
        if isinstance(plain.get("items"), list):  # draft 4
            plain["prefixItems"] = plain.pop("items")
            if "additionalItems" in plain:
                plain["items"] = plain["additionalItems"]
        plain.pop("additionalItems", None)
        for word, given in plain.items():
            if (wanted := _FORMS.get(word)) is not None and not wanted.fits(given):
                raise _Unsupported(place, word, f"it is not {wanted.name}")
        return plain

    def _body(self, schema: dict[str, Any], place: str) -> Node:
        if "$ref" in schema:
            return self._reference(schema, place)
        for word in ("anyOf", "oneOf"):  # before allOf, which may join one more of them
            if word in schema:
                return self._alternatives(schema, word, place)
        if "allOf" in schema:
            merged: Any = _without(schema, "allOf")
            branches = self._branches(schema, "allOf", place, least=0)
            if len(branches) == 1 and not merged:
                return self.value(branches[0], _joined(place, "allOf.0"))
            for branch in branches:
                merged = self._both(merged, branch, _joined(place, "allOf"), outer=True)
            return self.value(merged, place)
        if "enum" in schema or "const" in schema:
            return self._constants(schema, place)
        return choice([self._of_type(kind, schema, place) for kind in self._types(schema, place)])

    # references and combinations

    def _reference(self, schema: dict[str, Any], place: str) -> Node:
        target = self._target(schema["$ref"], place)
        rest = _without(schema, "$ref")
        if not rest:
            return self.value(target, place)
        return self.value(self._both(rest, target, place, outer=True), place)

    def _target(self, reference: Any, place: str) -> Any:
        if not isinstance(reference, str) or not reference.startswith("#"):
            raise _Unsupported(place, "$ref", "only references within the schema are supported")
        found: Any = self._root
        for part in unquote(reference[1:]).split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            if isinstance(found, dict) and name in found:
                found = found[name]
            elif isinstance(found, list) and (at := _index(name)) is not None and at < len(found):
                found = found[at]
            else:
                raise _Unsupported(place, "$ref", f"there is no {reference[:100]!r} in the schema")
        if reference not in ("#", "#/") and not reference.startswith("#/"):
            raise _Unsupported(place, "$ref", "anchors are not supported; use a path")
        if not isinstance(found, dict | bool):
            raise _Unsupported(place, "$ref", f"{reference[:100]!r} is not a schema")
        if self._bases is None:
            self._bases = _has_bases(self._root)
        if self._bases:
            raise _Unsupported(place, "$ref", "beside an $id below the top, from which references start anew")
        return found

    def _branches(self, schema: Mapping[str, Any], word: str, place: str, least: int = 1) -> list[Any]:
        found = schema[word]
        if not isinstance(found, list) or len(found) < least:
            raise _Unsupported(place, word, "it is not a list of schemas")
        return found

    def _alternatives(self, schema: dict[str, Any], word: str, place: str) -> Node:
        branches = self._branches(schema, word, place)
        base, inner = _without(schema, word), _joined(place, word)
        if base:
            branches = [self._both(base, branch, inner, outer=True) for branch in branches]
        if word == "oneOf" and not self._disjoint(branches, place):
            raise _Unsupported(
                place, word, "its branches overlap; use anyOf, or give each branch a constant of its own"
            )
        return choice([self.value(branch, _joined(inner, str(at))) for at, branch in enumerate(branches)])

    def _disjoint(self, branches: list[Any], place: str) -> bool:
        resolved = [self._resolved(branch, place) for branch in branches]
        values = [_listed(one) or () if isinstance(one, dict) else () for one in resolved]
        self._spend((len(branches) + sum(map(len, values))) ** 2 // 2_000)  # each is compared with each
        return all(_cannot_both_hold(one, other) for at, one in enumerate(resolved) for other in resolved[at + 1 :])

    def _resolved(self, schema: Any, place: str) -> Any:
        """The schema that references stand for, as far as they stand alone."""
        for _ in range(32):
            if not isinstance(schema, dict) or "$ref" not in schema:
                break
            target = self._target(schema["$ref"], place)
            rest = {word: given for word, given in schema.items() if word in _KNOWN and word != "$ref"}
            schema = self._both(rest, target, place) if rest else target
        return schema

    def _both(self, one: Any, other: Any, place: str, *, outer: bool = False) -> Any:
        """A schema for what two schemas allow. `outer`: the second is a part of the first, which sees what it evaluates.
        Raises _Unsupported if their words cannot be joined."""
        self._spend(1)
        one, other = (self._merging(schema, place) for schema in (one, other))
        _check_joinable(one, other, place, outer=outer)
        if one is False or other is False:
            return False
        if one is True or other is True:
            return other if one is True else one
        merged = dict(one)
        for word, given in other.items():
            if word not in merged or _same(merged[word], given):
                merged[word] = given
            elif word == "const":
                return False
            elif word in _JOINS:
                merged[word] = _JOINS[word](merged[word], given)
            elif word in (
                "items",
                "additionalProperties",
                "propertyNames",
                "unevaluatedProperties",
                "unevaluatedItems",
            ):
                merged[word] = self._both(merged[word], given, place)
            elif word == "properties":
                continue
            elif word == "anyOf":
                merged.setdefault("allOf", [])
                merged["allOf"] = [*merged["allOf"], {"anyOf": given}]
            else:
                raise _Unsupported(place, word, "it stands in two schemas that hold together")
        if "properties" in one or "properties" in other:
            merged["properties"] = self._members_of_both(one, other, place)
        return merged

    def _merging(self, schema: Any, place: str) -> Any:
        """A schema as plain words, with its reference replaced by what it stands for."""
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise BadRequest(f"{self._param}: {_short(place)} has a part that is not a JSON schema", param=self._param)
        plain = self._plain(schema, place)
        if "$ref" not in plain:
            return plain or True
        reference = str(plain["$ref"])
        if reference in self._resolving:
            raise _Unsupported(place, "$ref", "it refers to itself, together with other words")
        self._resolving.append(reference)
        try:
            target = self._target(reference, place)
            rest = _without(plain, "$ref")
            return self._both(rest, target, place) if rest else self._merging(target, place)
        finally:
            self._resolving.pop()

    def _members_of_both(self, one: Mapping[str, Any], other: Mapping[str, Any], place: str) -> dict[str, Any]:
        """The properties of an object that two schemas are about. A property of one of them only has to be what the other
        says about further ones."""
        mine, theirs = one.get("properties", {}), other.get("properties", {})
        self._spend((len(mine) + len(theirs)) // 16)
        merged = {}
        for name in dict.fromkeys([*mine, *theirs]):
            if name in mine and name in theirs:
                merged[name] = self._both(mine[name], theirs[name], place)
                continue
            own, rest = (mine[name], other) if name in mine else (theirs[name], one)
            merged[name] = (
                self._both(own, rest["additionalProperties"], place) if "additionalProperties" in rest else own
            )
        return merged

    # types

    def _types(self, schema: dict[str, Any], place: str) -> list[str]:
        given = schema.get("type")
        if given is None:
            found = [kind for kind in ("object", "array", "string", "number") if _BY_TYPE[kind] & schema.keys()]
            return found or list(TYPES)
        listed = [given] if isinstance(given, str) else given
        for kind in listed:
            if kind not in (*TYPES, "integer"):
                raise _Unsupported(place, "type", f"{str(kind)[:50]!r} is not a type")
        return list(dict.fromkeys(listed))

    def _of_type(self, kind: str, schema: dict[str, Any], place: str) -> Node:
        match kind:
            case "object":
                return self._object(schema, place)
            case "array":
                return self._array(schema, place)
            case "string":
                return self._string(schema, place)
            case "number" | "integer":
                bounds = self._bounds(schema, place)
                whole = kind == "integer" or "multipleOf" in schema  # which is 1
                return number_rules.integer(bounds) if whole else number_rules.number(bounds)
            case "boolean":
                return choice([Text("true"), Text("false")])
            case _:
                return Text("null")

    def _anything(self) -> Rule:
        if self._any_value is None:
            name = self.rules.reserve()
            self._any_value = Rule(name)
            self.rules.add(name, choice([self._of_type(kind, {}, "") for kind in TYPES]))
        return self._any_value

    def _constants(self, schema: dict[str, Any], place: str) -> Node:
        values = schema["enum"] if "enum" in schema else [schema["const"]]
        self._spend(len(values) // 64)
        if "enum" in schema and "const" in schema:
            values = [value for value in values if _same(value, schema["const"])]
        if wrong := sorted(schema.keys() - {"enum", "const", "type", "format", "minLength", "maxLength", *_COMPARED}):
            raise _Unsupported(place, wrong[0], "beside enum or const")
        kinds = self._types(schema, place) if "type" in schema else [*TYPES, "integer"]
        least, most = self._counts(schema, "minLength", "maxLength")
        kept = [value for value in values if _is_of(value, kinds)]
        kept = [value for value in kept if not _is_number(value) or _within(value, schema)]
        kept = [v for v in kept if not isinstance(v, str) or (least <= len(v) and (most is None or len(v) <= most))]
        return choice([self._constant(value) for value in kept]) if kept else IMPOSSIBLE

    def _constant(self, value: Any) -> Node:
        if isinstance(value, str):
            return self.strings.exactly(value)
        if isinstance(value, dict):
            members = [self._member(self.strings.exactly(name), self._constant(inner)) for name, inner in value.items()]
            return self._enclosed("{", members, "}")
        if isinstance(value, list):
            return self._enclosed("[", [self._constant(inner) for inner in value], "]")
        return Text(json.dumps(value))

    def _enclosed(self, start: str, parts: list[Node], end: str) -> Node:
        """Parts with commas and white space between brackets."""
        inner: list[Node] = []
        for at, part in enumerate(parts):
            inner += [part] if not at else [self._comma, part]
        closing = [self._space] if parts else []
        return sequence(Text(start), self._space, *inner, *closing, Text(end))

    @property
    def _comma(self) -> Node:
        return sequence(self._space, Text(","), self._space)

    def _member(self, name: Node, value: Node) -> Node:
        return sequence(name, self._space, Text(":"), self._space, value)

    def _string(self, schema: dict[str, Any], place: str) -> Node:
        least, most = self._counts(schema, "minLength", "maxLength")
        for bound, word in ((least, "minLength"), (most or 0, "maxLength")):
            if bound > MAX_REPEATS:
                raise _Unsupported(place, word, f"over {MAX_REPEATS:,}")
        if "pattern" not in schema:
            form = schema.get("format")
            if isinstance(form, str) and form in _FORMATS and (least, most) == (0, None):
                return string_of(_FORMATS[form], self.strings)
            return self.strings.any(least, most)
        try:
            return string_of(schema["pattern"], self.strings, least, most)
        except UnsupportedPattern as error:
            raise _Unsupported(place, "pattern", str(error)) from None

    def _bounds(self, schema: dict[str, Any], place: str) -> Bounds:
        if schema.get("multipleOf", 1) != 1:
            raise _Unsupported(place, "multipleOf")
        found = Bounds()
        for word in _COMPARED:
            below = word.endswith("inimum")
            if word not in schema or (schema[word] <= -ENDLESS if below else schema[word] >= ENDLESS):
                continue
            value, is_open = _decimal(schema[word]), word.startswith("exclusive")
            if abs(value) > MAX_BOUND or len(value.as_tuple().digits) > 60:
                raise _Unsupported(place, word, "it has too many digits")
            if below:
                if found.low is None or value > found.low or (value == found.low and is_open):
                    found = found._replace(low=value, low_open=is_open)
            elif found.high is None or value < found.high or (value == found.high and is_open):
                found = found._replace(high=value, high_open=is_open)
        return found

    def _counts(self, schema: dict[str, Any], low: str, high: str) -> tuple[int, int | None]:
        return int(schema.get(low, 0)), int(schema[high]) if high in schema else None

    # arrays

    def _array(self, schema: dict[str, Any], place: str) -> Node:
        least, most = self._counts(schema, "minItems", "maxItems")
        if schema.get("uniqueItems") is True and (most is None or most > 1):
            raise _Unsupported(place, "uniqueItems")
        if least > MAX_COUNT or (most or 0) > MAX_COUNT:
            raise _Unsupported(place, "minItems" if least > MAX_COUNT else "maxItems", f"over {MAX_COUNT:,}")
        prefix = schema.get("prefixItems", [])
        rest = schema.get("items", schema.get("unevaluatedItems", True))
        if most is not None and least > most:
            return IMPOSSIBLE
        inner = self._items(
            [self.value(one, _joined(place, f"prefixItems.{at}")) for at, one in enumerate(prefix[:most])],
            self.value(rest, _joined(place, "items")), least, most,
        )  # fmt: skip
        return sequence(Text("["), self._space, inner, Text("]"))

    def _items(self, prefix: list[Node], rest: Node, least: int, most: int | None) -> Node:
        """The items of an array, with the white space behind them."""
        tail: Node = self._space
        if most is None or most > len(prefix):
            comma = sequence(self._comma, rest) if prefix else rest
            more = None if most is None else most - len(prefix)
            tail = self._some(comma, sequence(self._comma, rest), max(0, least - len(prefix)), more)
        for at in range(len(prefix) - 1, -1, -1):
            part = prefix[at] if at == 0 else sequence(self._comma, prefix[at])
            body = sequence(part, tail)
            tail = self.rules.new(body if at < least else choice([body, self._space]))
        return tail

    def _some(self, first: Node, further: Node, least: int, most: int | None) -> Node:
        """`least` to `most` nodes, the first of which has another form, with the white space behind them."""
        if most is not None and least > most:
            return IMPOSSIBLE
        if most == 0:
            return self._space
        one = sequence(first, Repeat(further, max(0, least - 1), None if most is None else most - 1), self._space)
        return one if least else choice([self._space, one])

    # objects

    def _object(self, schema: dict[str, Any], place: str) -> Node:
        least, most = self._counts(schema, "minProperties", "maxProperties")
        properties = schema.get("properties", {})
        required = schema.get("required", [])
        further = self._further(schema, place)
        # a required name that is not in `properties` is one of the further members
        rest = schema.get("additionalProperties", schema.get("unevaluatedProperties", True))
        members = properties | {name: rest for name in required if name not in properties}
        values = {name: self.value(one, _joined(place, f"properties.{name}")) for name, one in members.items()}
        self._check_counts(schema, values, set(required), least, most, further, place)
        if most is not None and max(least, len(set(required))) > most:
            return IMPOSSIBLE
        fits = most is None or (further is None and most >= len(values))
        if fits and least <= max(1, len(set(required))):
            body = self._members(values, set(required), further, needs_one=least > len(set(required)))
            return sequence(Text("{"), self._space, body, Text("}"))
        body = self._counted(list(values.items()), set(required), further, least, most)
        return sequence(Text("{"), self._space, body, Text("}"))

    def _further(self, schema: dict[str, Any], place: str) -> Node | None:
        """A further member of an object; None if there may be none."""
        properties = schema.get("properties", {})
        known = [*properties, *schema.get("required", ())]
        if "patternProperties" in schema:
            return self._matching(schema, known, place)
        closed = bool(properties)
        rest = schema.get("additionalProperties", schema.get("unevaluatedProperties", not closed))
        value = self.value(rest, _joined(place, "additionalProperties"))
        if "propertyNames" in schema and known:
            raise _Unsupported(place, "propertyNames", "beside properties or required")
        if rest is False or sum(map(len, known)) > MAX_NAMES or max(map(len, known), default=0) > MAX_NAME:
            return None
        if "propertyNames" in schema:
            name = self.value(self._named(schema["propertyNames"], place), _joined(place, "propertyNames"))
        else:
            name = self.strings.other_than(known) if known else self.strings.any()
        return self._member(name, value)

    def _named(self, schema: Any, place: str) -> Any:
        """The schema of names, all of which are strings."""
        return self._both(schema, {"type": "string"}, place)

    def _matching(self, schema: dict[str, Any], known: list[str], place: str) -> Node:
        """A member whose name matches an expression."""
        given = schema["patternProperties"]
        if len(given) != 1 or known or "propertyNames" in schema:
            raise _Unsupported(place, "patternProperties", "only one expression, without properties or propertyNames")
        if schema.get("additionalProperties") not in (None, False):
            raise _Unsupported(place, "patternProperties", "beside additionalProperties that are allowed")
        ((pattern, value),) = given.items()
        try:
            name = string_of(pattern, self.strings)
        except UnsupportedPattern as error:
            raise _Unsupported(place, "patternProperties", str(error)) from None
        return self._member(name, self.value(value, _joined(place, "patternProperties")))

    def _check_counts(
        self, schema: dict[str, Any], values: dict[str, Node], required: set[str], least: int, most: int | None,
        further: Node | None, place: str,
    ) -> None:  # fmt: skip
        """Raises _Unsupported for counts of members that rules cannot hold."""
        if further is not None and least > max(1, len(required)):
            # two members with one name count once
            raise _Unsupported(place, "minProperties", "over 1, where names are free")
        if least > MAX_COUNT or (most or 0) > MAX_COUNT:
            raise _Unsupported(place, "minProperties" if least > MAX_COUNT else "maxProperties", f"over {MAX_COUNT:,}")
        counted = least > len(required) or (most is not None and (further is not None or most < len(values)))
        if counted and len(values) > 32:
            word = "maxProperties" if "maxProperties" in schema else "minProperties"
            raise _Unsupported(place, word, "beside more than 32 properties")

    def _members(
        self, values: Mapping[str, Node], required: set[str], further: Node | None, *, needs_one: bool
    ) -> Node:
        """The members in order, each optional one present or not: two rules for each, before and after a first member."""
        after: Node = self._space
        before: Node = self._space
        if further is not None:
            following = Repeat(sequence(self._comma, further), 0, None)
            after = self.rules.new(sequence(following, self._space))
            one = sequence(further, after)
            before = one if needs_one else choice([one, self._space])
        elif needs_one:
            before = IMPOSSIBLE
        for name in reversed(list(values)):
            member = self._member(self.strings.exactly(name), values[name])
            first, next_ = sequence(member, after), sequence(self._comma, member, after)
            if name in required:
                before, after = self.rules.new(first), self.rules.new(next_)
            else:
                before, after = self.rules.new(choice([first, before])), self.rules.new(choice([next_, after]))
        return before

    def _counted(
        self, values: list[tuple[str, Node]], required: set[str], further: Node | None, least: int, most: int | None
    ) -> Node:
        """Like `_members`, with a rule for each number of members so far."""
        made: dict[tuple[int, int], Node] = {}

        def rest(at: int, count: int) -> Node:
            """The members from `at` on, behind `count` others."""
            key = (at, count)
            if key not in made:
                made[key] = self.rules.new(body(at, count))
            return made[key]

        def body(at: int, count: int) -> Node:
            comma = [self._comma] if count else []
            if at == len(values):
                if further is None:
                    return self._space if least <= count else IMPOSSIBLE
                left = None if most is None else most - count
                missing = max(0, least - count)
                return self._some(sequence(*comma, further), sequence(self._comma, further), missing, left)
            name, value = values[at]
            options = []
            if most is None or count < most:
                member = self._member(self.strings.exactly(name), value)
                options.append(sequence(*comma, member, rest(at + 1, count + 1)))
            if name not in required:
                options.append(rest(at + 1, count))
            return choice(options) if options else IMPOSSIBLE

        return rest(0, 0)


def _check_joinable(one: Any, other: Any, place: str, *, outer: bool) -> None:
    """Raises _Unsupported for words that speak of other words beside them, which a joined schema would change."""
    for word in ("unevaluatedProperties", "unevaluatedItems"):
        if _has(other, word) or (_has(one, word) and not outer):
            raise _Unsupported(place, word, "it stands in one of two schemas that hold together")
    if not isinstance(one, dict) or not isinstance(other, dict):
        return
    for first, second in ((one, other), (other, one)):
        if "patternProperties" in first and {"properties", "additionalProperties"} & second.keys():
            raise _Unsupported(place, "patternProperties", "it stands in one of two schemas that hold together")
        if "prefixItems" in first and "prefixItems" not in second and "items" in one.keys() | other.keys():
            raise _Unsupported(place, "prefixItems", "it stands in one of two schemas that hold together")


def _has(schema: Any, word: str) -> bool:
    return isinstance(schema, dict) and word in schema


def _joined(place: str, word: str) -> str:
    return f"{place}.{word}" if place else word


def _without(schema: Mapping[str, Any], word: str) -> dict[str, Any]:
    return {name: given for name, given in schema.items() if name != word}


def _without_effect(word: str, schema: Mapping[str, Any]) -> bool:
    """Whether a word that is refused says nothing here."""
    given = schema[word]
    if word in ("then", "else"):
        return "if" not in schema
    if word == "if":
        return "then" not in schema and "else" not in schema
    if word in ("contains", "minContains", "maxContains"):
        return "contains" not in schema or (schema.get("minContains") == 0 and "maxContains" not in schema)
    return given is False if word == "not" else given == {}


def _short(place: str) -> str:
    return place if len(place) <= MAX_PLACE else f"…{place[-MAX_PLACE:]}"


def _index(name: str) -> int | None:
    """The index in a list that a part of a reference names, if it names one."""
    return int(name) if name.isascii() and name.isdecimal() and len(name) < 6 else None


def _has_bases(root: Any) -> bool:
    """Whether a schema has parts with an `$id` of their own."""
    waiting = list(children(root))
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict) and isinstance(part.get("$id"), str):
            return True
        waiting += children(part)
    return False


def children(node: Any) -> Iterable[Any]:
    """The values within a JSON object or list; none within other values."""
    if isinstance(node, dict):
        return node.values()
    return node if isinstance(node, list) else ()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return _is_number(value) and 0 <= value < ENDLESS and value == int(value)


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


class _Form(NamedTuple):
    """What a word must hold."""

    name: str
    fits: Callable[[Any], bool]


_NAME_TO_SCHEMA = _Form("an object of schemas", lambda value: isinstance(value, dict))
_LIST = _Form("a list", lambda value: isinstance(value, list))
_FORMS: dict[str, _Form] = {
    "$ref": _Form("a reference", lambda value: isinstance(value, str)),
    "pattern": _Form("an expression", lambda value: isinstance(value, str)),
    "required": _Form("a list of names", _are_names),
    "type": _Form("a type or a list of types", lambda value: isinstance(value, str) or _are_names(value)),
    "uniqueItems": _Form("true or false", lambda value: isinstance(value, bool)),
    **dict.fromkeys(("properties", "patternProperties"), _NAME_TO_SCHEMA),
    **dict.fromkeys(("enum", "prefixItems", "allOf", "anyOf", "oneOf"), _LIST),
    **dict.fromkeys((*_COMPARED, "multipleOf"), _Form("a number", _is_number)),
    **dict.fromkeys(
        ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"),
        _Form("a whole number from 0 on", _is_count),
    ),
}


def _decimal(value: float) -> Decimal:
    """The number that a text of JSON stands for; floats beyond the exact integers as they are."""
    return Decimal(value) if isinstance(value, int) or abs(value) >= number_rules.EXACT else Decimal(repr(value))


def _is_of(value: Any, kinds: Iterable[str]) -> bool:
    """Whether a JSON value has one of the types."""
    if isinstance(value, bool):
        return "boolean" in kinds
    if isinstance(value, int | float):
        return "number" in kinds or ("integer" in kinds and value == int(value))
    names = {str: "string", dict: "object", list: "array", type(None): "null"}
    return names[type(value)] in kinds


def _within(value: float, schema: Mapping[str, Any]) -> bool:
    return all(word not in schema or holds(value, schema[word]) for word, holds in _COMPARED.items())


def _same(one: Any, other: Any) -> bool:
    """Whether two JSON values are equal; true is not 1."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
    return bool(one == other)


def _cannot_both_hold(one: Any, other: Any) -> bool:
    """Whether it is plain that no value satisfies both schemas: other types, other constants, or objects with other
    constants under one required name."""
    if one is False or other is False:
        return True
    if not isinstance(one, dict) or not isinstance(other, dict):
        return False
    one, other = _fitting(one), _fitting(other)
    values, others = _listed(one), _listed(other)
    if values is not None and others is not None:
        return not any(_same(value, given) for value in values for given in others)
    kinds, other_kinds = _kinds(one), _kinds(other)
    if kinds is not None and other_kinds is not None and not kinds & other_kinds:
        return True
    # without a type, both are about objects only, or a value of another type could satisfy both
    if {"object"} not in (kinds, other_kinds) and not all(schema.keys() <= _OBJECT for schema in (one, other)):
        return False
    mine, theirs = one.get("properties", {}), other.get("properties", {})
    names = set(one.get("required", ())) & set(other.get("required", ())) & mine.keys() & theirs.keys()
    return any(_cannot_both_hold(mine[name], theirs[name]) for name in names)


def _fitting(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The words of a schema that are known and have their form."""
    return {
        word: given
        for word, given in schema.items()
        if word in _KNOWN and (word not in _FORMS or _FORMS[word].fits(given))
    }


def _listed(schema: Mapping[str, Any]) -> list[Any] | None:
    """The values that a schema lists; None if it lists none."""
    if "const" in schema:
        return [schema["const"]]
    return schema["enum"] if isinstance(schema.get("enum"), list) else None


def _kinds(schema: Mapping[str, Any]) -> set[str] | None:
    """The types of a schema, integers as numbers; None if it does not say."""
    given = schema.get("type")
    if given is None and (values := _listed(schema)) is not None:
        return {kind for kind in TYPES for value in values if _is_of(value, (kind,))}
    if given is None:
        return None
    listed = [given] if isinstance(given, str) else given
    return {"number" if kind == "integer" else str(kind) for kind in listed}


def _types_of_both(one: Any, other: Any) -> Any:
    mine, theirs = ([given] if isinstance(given, str) else list(given) for given in (one, other))
    both = [kind for kind in mine if kind in theirs or (kind == "integer" and "number" in theirs)]
    both += [kind for kind in theirs if kind == "integer" and "number" in mine and kind not in both]
    return both


def _values_of_both(one: list[Any], other: list[Any]) -> list[Any]:
    return [value for value in one if any(_same(value, given) for given in other)]


def _names_of_both(one: list[str], other: list[str]) -> list[str]:
    return list(dict.fromkeys([*one, *other]))


_JOINS: dict[str, Callable[[Any, Any], Any]] = {
    "type": _types_of_both,
    "enum": _values_of_both,
    "required": _names_of_both,
    "allOf": lambda one, other: [*one, *other],
    "format": lambda one, other: one,
    "uniqueItems": lambda one, other: one or other,
    **dict.fromkeys(("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties"), max),
    **dict.fromkeys(("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties"), min),
}
