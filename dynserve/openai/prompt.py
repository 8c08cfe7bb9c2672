"""From messages to token ids: the model's own chat template, as transformers renders it, then its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from dynserve.errors import BadRequest, InternalError
from dynserve.wire.requests import Sampling

SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class Preprocessor:
    """One model's tokenizer, template and sampling defaults, from the files of its card."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.tokenizer = Tokenizer.from_buffer(files["tokenizer.json"])
        config = json.loads(files.get("tokenizer_config.json", b"{}"))
        source = (
            files["chat_template.jinja"].decode() if "chat_template.jinja" in files else config.get("chat_template")
        )
        if isinstance(source, list):  # several named templates
            source = next((t["template"] for t in source if t["name"] == "default"), None)
        self._special = {name: _text(config[name]) for name in SPECIAL if config.get(name)}
        self._template = _environment().from_string(source) if source else None
        self.defaults = sampling_defaults(json.loads(files.get("generation_config.json", b"{}")))

    def chat(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any] | None = None) -> list[int]:
        """Token ids of a conversation with the opening of the assistant's turn.

        Raises:
            BadRequest: the model has no template, or its template refuses these messages.
        """
        return self.tokenize(self.render(messages, variables), special=False)

    def render(
        self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any] | None = None,
        now: datetime | None = None,
    ) -> str:  # fmt: skip
        """The text that `chat` tokenises; raises what `chat` raises. `now` is what templates that print the date see."""
        ours: dict[str, Any] = {
            "messages": messages,
            "add_generation_prompt": True,
            "tools": None,
            "documents": None,
            **self._special,
        }
        if now is not None:
            ours["strftime_now"] = now.strftime
        if taken := sorted(ours.keys() & (variables or {}).keys() - {"add_generation_prompt", "documents"}):
            raise BadRequest(f"chat_template_kwargs cannot set {taken[0]}", param="chat_template_kwargs")
        if self._template is None:
            raise BadRequest("this model has no chat template; use /v1/completions")
        try:
            return self._template.render(ours | dict(variables or {}))
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            raise BadRequest(f"the model's chat template refused these messages: {error}", param="messages") from error

    def tokenize(self, text: str, *, special: bool = True) -> list[int]:
        """`special`: with the tokens that the tokenizer puts around a text of its own (a BOS, for one)."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=special).ids
        return ids


def sampling_defaults(generation_config: Mapping[str, Any]) -> Sampling:
    """What a request without sampling fields gets: the model makers' recommendation; greedy when they say so."""
    known = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    found = {name: generation_config[name] for name in known if generation_config.get(name) is not None}
    if generation_config.get("do_sample") is False:
        found = {"temperature": 0.0}
    try:
        return Sampling(**found)
    except TypeError as error:
        raise InternalError(f"generation_config.json: {error}") from error


def _environment() -> ImmutableSandboxedEnvironment:
    """The sandbox, options, filters and functions that chat templates are written for."""

    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **rest: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **rest)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _text(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else str(token)
