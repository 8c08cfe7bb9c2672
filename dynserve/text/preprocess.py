"""Conversion of messages to token ids: the model's chat template, rendered as transformers does, then its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from dynserve.dialects import reasoning
from dynserve.errors import BadRequest, ContextTooLong, InternalError
from dynserve.text.segments import Segments
from dynserve.text.template import ChatTemplates
from dynserve.wire.requests import SamplingParams

LIKELY_CHARACTERS = 8  # per token of the context: a text with at most this many is tokenised without a length check
SLICE = 1 << 16  # characters that the length check of a longer text tokenises at a time

SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class Conversation(NamedTuple):
    """The input of a chat template. A message's content is a text or None, and the arguments of its calls are JSON text."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    variables: Mapping[str, Any] = {}
    continue_last: bool = False  # the last turn is the beginning of the answer


class Preprocessor:
    """One model's tokenizer, template and sampling defaults, from the files of its card."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.tokenizer = Tokenizer.from_buffer(files["tokenizer.json"])
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.vocab_size: int = self.tokenizer.get_vocab_size()
        added = self.tokenizer.get_added_tokens_decoder()
        self.highest_id: int = max(self.tokenizer.get_vocab_size(with_added_tokens=False) - 1, *added, 0)
        self.special_ids = {token.content: id_ for id_, token in added.items() if token.special}
        self.segments = Segments(self.tokenizer)
        self._around = _around(self.tokenizer)
        config = json.loads(files.get("tokenizer_config.json", b"{}"))
        named = json.loads(files.get("special_tokens_map.json", b"{}")) | config
        self._special = {name: _text(named[name]) for name in SPECIAL if named.get(name)}
        self.templates = ChatTemplates(files, config, self._special)
        self.opens_reasoning = self._opens_reasoning()
        self.defaults = sampling_defaults(json.loads(files.get("generation_config.json", b"{}")))

    def chat(
        self, conversation: Conversation, max_context: int | None = None, owner: str = ""
    ) -> tuple[str, list[int]]:
        """Returns a conversation, with the opening of the assistant's turn, as text and as token ids.
        `owner`: see `Segments.encode`.

        Raises:
            BadRequest: the model has no template, or its template refuses these messages.
            ContextTooLong: the text certainly has over twice `max_context` tokens.
        """
        contents = "".join(str(message.get("content") or "") for message in conversation.messages)
        self._check_length(contents, max_context, "messages")  # before the template copies and searches it
        text = self.render(conversation)
        self._check_length(text, max_context, "messages")
        return text, self.segments.encode(text, owner)

    def render(self, conversation: Conversation, now: datetime | None = None) -> str:
        """Returns the text that `chat` tokenises; raises what `chat` raises. `now`: the time that a template may print."""
        ours: dict[str, Any] = {
            "add_generation_prompt": not conversation.continue_last,
            "tools": conversation.tools or None,
            "documents": None,
        }
        if now is not None:
            ours["strftime_now"] = now.strftime
        own = ours.keys() | self._special.keys() | {"messages"}
        reserved = sorted(own & conversation.variables.keys() - {"add_generation_prompt", "documents"})
        if reserved:
            raise BadRequest(f"chat_template_kwargs cannot set {reserved[0]}", param="chat_template_kwargs")
        template = self.templates.choose(tools=bool(conversation.tools))
        messages = _marked(conversation.messages) if conversation.continue_last else conversation.messages
        try:
            text = template.render(messages, ours | dict(conversation.variables))
        except Exception as error:  # a template is foreign code and may raise anything to refuse messages
            reason = str(error) or type(error).__name__
            raise BadRequest(f"the model's chat template refused these messages: {reason}", param="messages") from error
        return _unbroken(_before_mark(text) if conversation.continue_last else text)

    def _opens_reasoning(self) -> bool:
        """Whether the template opens the reasoning, rather than the model."""
        probe = Conversation([{"role": "user", "content": "x"}], variables={"enable_thinking": True})
        try:
            return self.render(probe).rstrip().endswith(reasoning.BEGIN)
        except BadRequest:
            return False

    def tokenize(
        self, text: str, *, special: bool = True, max_context: int | None = None, owner: str = "", param: str = "prompt"
    ) -> list[int]:
        """Returns the token ids of a text. `special`: with the tokens that the tokenizer adds around a text (such as BOS).
        `owner`: see `Segments.encode`.

        Raises:
            ContextTooLong: the text certainly has over twice `max_context` tokens.
        """
        self._check_length(text, max_context, param)
        if not special:
            return self.segments.encode(text, owner)
        if self._around is None:
            # a batch, even of one text: only a batch releases the interpreter's lock
            ids: list[int] = self.tokenizer.encode_batch_fast([text])[0].ids
            return ids
        before, after = self._around
        return [*before, *self.segments.encode(text, owner), *after]

    def _check_length(self, text: str, max_context: int | None, param: str) -> None:
        """Raises what `tokenize` raises. The cost is bounded by `max_context`, not by the length of the text.

        A slice may cut a word in two, which changes a few tokens in thousands: hence the bound of twice `max_context`.
        """
        if max_context is None or len(text) <= LIKELY_CHARACTERS * max_context:
            return
        found = 0
        for at in range(0, len(text), SLICE):
            found += len(self.tokenizer.encode_batch_fast([text[at : at + SLICE]], add_special_tokens=False)[0])
            if found > 2 * max_context:
                raise ContextTooLong(
                    f"This model's maximum context length is {max_context} tokens. However, your prompt has more than "
                    f"{2 * max_context} tokens. Please shorten it.",
                    param=param,
                )


def _around(tokenizer: Tokenizer) -> tuple[list[int], list[int]] | None:
    """The token ids that the tokenizer adds before and after any text; None where they cannot be separated from it."""
    bare, whole = (tokenizer.encode("x", add_special_tokens=special).ids for special in (False, True))
    for at in range(len(whole) - len(bare) + 1):
        if bare and whole[at : at + len(bare)] == bare:
            return whole[:at], whole[at + len(bare) :]
    return None


_MARK = "\ue000here the answer goes on\ue001"  # private-use characters, which no real text has


def _marked(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The messages, with a mark at the end of the last one, so that the text which a template adds after it can be cut."""
    return [*messages[:-1], {**messages[-1], "content": str(messages[-1].get("content") or "") + _MARK}]


def _before_mark(text: str) -> str:
    at = text.rfind(_MARK)
    if at < 0:
        raise BadRequest("the last message cannot be continued: the template does not show its text", param="messages")
    return text[:at]


def _unbroken(text: str) -> str:
    """Replaces halves of surrogate pairs, which JSON can hold and UTF-8 cannot, with replacement characters."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def sampling_defaults(generation_config: Mapping[str, Any]) -> SamplingParams:
    """The sampling of a request without sampling fields: the model's recommended values; greedy for `do_sample: false`."""
    known = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    found = {name: generation_config[name] for name in known if generation_config.get(name) is not None}
    if generation_config.get("do_sample") is False:
        found = {"temperature": 0.0}
    try:
        return SamplingParams(**found)
    except TypeError as error:
        raise InternalError(f"generation_config.json: {error}") from error


def _text(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else str(token)
