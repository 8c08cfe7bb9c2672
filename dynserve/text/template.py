"""Chat templates: found in a model's files, compiled and rendered as transformers does, and given messages in the form that
each template expects.

Templates differ in the form of a tool call. Some join the arguments as JSON text, others serialise an object; some look for
a call only where the content is none, others print the content whatever it is. A template that gets another form fails, or
loses the call. So each template renders a few probes once, and gets the form with which the probes show everything.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any, NamedTuple, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from dynserve.errors import BadRequest

DEFAULT, TOOL_USE = "default", "tool_use"
FILE, LEGACY_FILE, FOLDER = "chat_template.jinja", "chat_template.json", "additional_chat_templates/"
Messages = Sequence[Mapping[str, Any]]
# fields in which clients send the reasoning of earlier turns; templates read the first
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
_REASONING = frozenset(REASONING_FIELDS)


class MessageForm(NamedTuple):
    """The form in which a template expects messages."""

    parts: bool = False  # contents are lists of parts, not texts
    objects: bool = True  # the arguments of a call are an object, not JSON text
    null: bool = True  # a message of calls alone has no content, rather than an empty one
    apart: bool = False  # text and calls are in messages of their own

    def apply(self, messages: Messages) -> list[Mapping[str, Any]]:
        """Returns the messages, of which content is a text or None and arguments are JSON text, in this form."""
        out: list[dict[str, Any]] = []
        for message in messages:
            if not _REASONING.isdisjoint(message):
                message = _with_reasoning(message)
            if message.get("tool_calls"):
                out += self._calling(message)
            else:
                out.append({**message, "content": message.get("content") or ""})
        return [self._in_parts(message) for message in out] if self.parts else list(out)

    def _calling(self, message: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """A message with calls, as one or as two."""
        calls = [self._call(call) for call in message["tool_calls"]]
        text, nothing = message.get("content"), None if self.null else ""
        if text and self.apart:
            yield {name: value for name, value in message.items() if name != "tool_calls"}
            text = None
        yield {**message, "content": text or nothing, "tool_calls": calls}

    def _call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        function = call["function"]
        arguments: Any = function["arguments"]
        if self.objects:
            try:
                parsed = json.loads(arguments or "{}")
                arguments = parsed if isinstance(parsed, dict) else arguments
            except (ValueError, RecursionError):
                pass  # invalid JSON that a model wrote: passed on unchanged
        return {**call, "function": {**function, "arguments": arguments}}

    @staticmethod
    def _in_parts(message: dict[str, Any]) -> dict[str, Any]:
        content = message["content"]
        return message if content is None else {**message, "content": [{"type": "text", "text": content}]}


class ChatTemplate:
    """One compiled template. Raises TemplateError when the source cannot be compiled."""

    def __init__(self, source: str, special: Mapping[str, str]) -> None:
        self.source = source
        self._template = _environment().from_string(source)
        self._special = special
        self.form = self._probed()

    def render(self, messages: Messages, variables: Mapping[str, Any]) -> str:
        """Renders messages in this template's form. A template is foreign code and may raise anything."""
        return self._template.render({**self._special, "messages": self.form.apply(messages), **variables})

    def _probed(self) -> MessageForm:
        form = self.form = MessageForm()
        self._ordinary = ""
        with suppress(Exception):
            self._ordinary = self.render(_ASKED, _PROBED)
        for parts in (False, True):
            if self._shows(form._replace(parts=parts), _ASKED, (_TEXT,)):
                form = form._replace(parts=parts)
                break
        called = (_NAME, _KEY, _VALUE)
        for objects, null in ((True, True), (True, False), (False, True), (False, False)):
            candidate = form._replace(objects=objects, null=null)
            if self._shows(candidate, [*_ASKED, *_called(None)], called):
                break
        else:
            return form._replace(null=False)  # this template shows no calls
        if not self._shows(candidate, [*_ASKED, *_called(_SAID)], (*called, _SAID)):
            apart = candidate._replace(apart=True)
            if self._shows(apart, [*_ASKED, *_called(_SAID)], (*called, _SAID)):
                return apart
        return candidate

    def _shows(self, form: MessageForm, messages: Messages, texts: tuple[str, ...]) -> bool:
        """Whether a rendered probe has all of these texts, none of them in Python's notation, or as JSON within JSON."""
        self.form = form
        try:
            found = self.render(messages, _PROBED)
        except Exception:
            return False
        broken = [text for text in ("None", f"'{_KEY}'", f'\\"{_KEY}\\"', "[{'") if text not in self._ordinary]
        return all(text in found for text in texts) and not any(text in found for text in broken)


_TEXT, _SAID, _NAME, _KEY, _VALUE = "probe-question", "probe-remark", "probe_tool", "probe_key", "probe_value"
_ASKED: list[dict[str, Any]] = [{"role": "user", "content": _TEXT}]
_TOOL = {"name": "tool", "description": "d", "parameters": {"type": "object", "properties": {"x": {"type": "string"}}}}
_PROBED = {"tools": [{"type": "function", "function": _TOOL}], "add_generation_prompt": True, "documents": None}


def _called(text: str | None) -> list[dict[str, Any]]:
    """A call and its result. The id has the only form that Mistral's templates accept."""
    function = {"name": _NAME, "arguments": json.dumps({_KEY: _VALUE})}
    call = {"id": "probe1234", "type": "function", "function": function}
    return [
        {"role": "assistant", "content": text, "tool_calls": [call]},
        {"role": "tool", "content": "result", "tool_call_id": "probe1234", "name": _NAME},
    ]


class ChatTemplates:
    """The templates of a model by name, as transformers finds them. One that cannot be compiled switches chats off, and
    nothing else."""

    def __init__(self, files: Mapping[str, bytes], config: Mapping[str, Any], special: Mapping[str, str]) -> None:
        self._templates: dict[str, ChatTemplate] = {}
        self._faults: dict[str, str] = {}
        self.sources = template_sources(files, config)
        for name, source in self.sources.items():
            try:
                self._templates[name] = ChatTemplate(source, special)
            except Exception as error:  # a template is foreign code: its compilation may fail in any way
                self._faults[name] = f"{error} (line {getattr(error, 'lineno', '?')})"

    @property
    def fault(self) -> str:
        """The reason why chats are off although there is a template; empty otherwise."""
        return next(iter(self._faults.values()), "") if not self._templates or DEFAULT in self._faults else ""

    def source(self, *, tools: bool) -> str:
        """The source of the template for conversations with or without tools; empty for none."""
        return self.sources.get(self._name(tools=tools), "")

    def choose(self, *, tools: bool) -> ChatTemplate:
        """Returns the template for a conversation. Raises BadRequest if the model has none for it."""
        name = self._name(tools=tools)
        if name in self._templates:
            return self._templates[name]
        if name in self._faults:
            raise BadRequest(f"this model's chat template cannot be used: {self._faults[name]}; use /v1/completions")
        if self.sources:
            have = ", ".join(sorted(self.sources))
            raise BadRequest(f"this model has no default chat template, only {have}; use /v1/completions")
        raise BadRequest("this model has no chat template; use /v1/completions")

    def _name(self, *, tools: bool) -> str:
        return TOOL_USE if tools and TOOL_USE in self.sources else DEFAULT


def template_sources(files: Mapping[str, bytes], config: Mapping[str, Any]) -> dict[str, str]:
    """Returns name to source. As in transformers, files of their own replace those of `tokenizer_config.json`."""
    found = {DEFAULT: files[FILE].decode("utf-8", "replace")} if FILE in files else {}
    for name in sorted(files):
        if name.startswith(FOLDER):
            found[name.removeprefix(FOLDER).removesuffix(".jinja")] = files[name].decode("utf-8", "replace")
    if found:
        return found
    given = config.get("chat_template")
    if not given and LEGACY_FILE in files:  # of processors, for models that also read images
        legacy = json.loads(files[LEGACY_FILE])
        given = legacy.get("chat_template") if isinstance(legacy, dict) else None
    if isinstance(given, list):
        given = {entry["name"]: entry["template"] for entry in given}
    if isinstance(given, dict):
        return {str(name): str(source) for name, source in given.items()}
    return {DEFAULT: str(given)} if given else {}


def _with_reasoning(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """The message, with its reasoning under the name that templates read, and under gpt-oss's."""
    found = next((message[name] for name in REASONING_FIELDS if message.get(name) is not None), None)
    return message if found is None else {"thinking": found, **message, "reasoning_content": found}


class _GenerationTag(Extension):
    """`{% generation %}`, with which training code finds the tokens of answers. As in transformers its body is a block of
    its own: variables that are set in it are not visible after it."""

    tags = frozenset({"generation"})  # type: ignore[assignment]

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    @staticmethod
    def _body(caller: Callable[[], str]) -> str:
        return caller()


class _Namespace(Namespace):
    """Jinja's namespace, without names that begin with an underscore: they could reach Python's own."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        values = dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a chat template cannot store {name!r} in a namespace")


class _Dict:
    """The function `dict`, without the attributes of the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _environment() -> ImmutableSandboxedEnvironment:
    """The sandbox, options, filters and functions that chat templates expect."""

    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **rest: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **rest)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    return environment
