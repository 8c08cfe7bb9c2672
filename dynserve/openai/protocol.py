"""OpenAI's JSON, checked at the edge: pydantic models in, wire types out. Nothing below knows these classes.

What this version does not do yet is refused by name, not dropped in silence.
"""

from __future__ import annotations

import secrets
import time
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dynserve.errors import BadRequest, ContextTooLong
from dynserve.openai.prompt import Preprocessor
from dynserve.wire.requests import Render, Sampling, Stop

MAX_STOPS = 16
MAX_INT = 2**31 - 1
TokenId = Annotated[int, Field(ge=0, le=MAX_INT)]
R = TypeVar("R", bound="Common")


class StreamOptions(BaseModel):
    include_usage: bool = False


class ContentPart(BaseModel):
    model_config = ConfigDict(extra="allow")
    type: str
    text: str | None = None


class Message(BaseModel):
    """A turn of the conversation. Fields that a template may want beyond these are passed on to it."""

    model_config = ConfigDict(extra="allow")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None

    def for_template(self) -> dict[str, Any]:
        fields = self.model_dump(exclude_unset=True)
        fields["content"] = self.text()
        if fields["role"] == "developer":  # OpenAI's newer name; templates know the older one
            fields["role"] = "system"
        return fields

    def text(self) -> str:
        if not isinstance(self.content, list):
            return self.content or ""
        for part in self.content:
            if part.type != "text" or part.text is None:
                raise BadRequest(f"content parts of type {part.type!r} are not supported", param="messages")
        return "".join(part.text or "" for part in self.content)


class Common(BaseModel):
    """Fields that chat and completions share. Unknown ones are ignored, as clients of other servers send many."""

    model_config = ConfigDict(extra="allow")

    model: str
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_INT)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: int | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    logit_bias: dict[TokenId, Annotated[float, Field(ge=-100, le=100)]] | None = None
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: list[TokenId] | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    min_tokens: Annotated[int, Field(ge=0, le=MAX_INT)] = 0
    max_tokens: Annotated[int, Field(ge=1, le=MAX_INT)] | None = None
    ignore_eos: bool = False
    n: int | None = None
    cache_salt: str | None = None
    priority: Annotated[int, Field(ge=-MAX_INT, le=MAX_INT)] | None = None

    def sampling(self, defaults: Sampling, logprobs: int | None) -> Sampling:
        """A request's own fields over the model's defaults. A seed is drawn here, so that every worker has the same."""

        def own(value: Any, default: Any) -> Any:
            return default if value is None else value

        return Sampling(
            temperature=own(self.temperature, defaults.temperature),
            top_p=own(self.top_p, defaults.top_p),
            top_k=max(0, own(self.top_k, defaults.top_k)),
            min_p=own(self.min_p, defaults.min_p),
            seed=secrets.randbits(63) if self.seed is None else self.seed & 0x7FFFFFFFFFFFFFFF,
            presence_penalty=own(self.presence_penalty, 0.0),
            frequency_penalty=own(self.frequency_penalty, 0.0),
            repetition_penalty=own(self.repetition_penalty, defaults.repetition_penalty),
            logit_bias=self.logit_bias or {},
            logprobs=logprobs,
        )

    def stops(self, prompt_tokens: int, max_seq_len: int, default_max_tokens: int | None) -> Stop:
        """Raises ContextTooLong when the prompt leaves no room for an answer."""
        room = max_seq_len - prompt_tokens
        if room < 1:
            raise ContextTooLong(
                f"This model's maximum context length is {max_seq_len} tokens. However, your messages resulted in "
                f"{prompt_tokens} tokens. Please reduce the length of the messages.",
                param="messages" if isinstance(self, ChatRequest) else "prompt",
            )
        wanted = self.answer_tokens() or default_max_tokens or room
        strings = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return Stop(
            max_tokens=min(wanted, room),
            min_tokens=min(self.min_tokens, wanted, room),
            strings=tuple(string for string in strings if string),
            token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=self.ignore_eos,
            include_string=self.include_stop_str_in_output,
        )

    def answer_tokens(self) -> int | None:
        return self.max_tokens

    def render(self, kind: Literal["chat", "completion"], logprobs: int | None) -> Render:
        head = "chatcmpl" if kind == "chat" else "cmpl"
        return Render(
            kind=kind,
            response_id=f"{head}-{secrets.token_hex(16)}",
            model=self.model,
            created=int(time.time()),
            stream=bool(self.stream),
            usage=bool(self.stream and self.stream_options and self.stream_options.include_usage),
            logprobs=logprobs,
            skip_special_tokens=self.skip_special_tokens,
        )

    def refuse_unsupported(self) -> None:
        """Raises BadRequest for what would change the answer and is not there yet."""
        if self.n not in (None, 1):
            raise BadRequest("n other than 1 is not supported yet", param="n")
        extra = self.model_extra or {}
        for name, harmless in _NOT_YET.items():
            if extra.get(name) not in (None, *harmless):
                raise BadRequest(f"{name} is not supported yet", param=name)
        if self.stream_options is not None and not self.stream:
            raise BadRequest("stream_options needs stream: true", param="stream_options")


# Fields of later versions, with the values that change nothing.
_NOT_YET: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "guided_json": (),
    "guided_regex": (),
    "guided_grammar": (),
    "guided_choice": (),
    "modalities": (["text"],),
    "audio": (),
    "suffix": ("",),
    "echo": (False,),
    "best_of": (1,),
}


class ChatRequest(Common):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_INT)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def prompt_ids(self, preprocessor: Preprocessor) -> list[int]:
        messages = [message.for_template() for message in self.messages]
        return preprocessor.chat(messages, self.chat_template_kwargs)

    def prompt_size(self) -> int:
        """Characters, roughly: what decides whether tokenising is worth a thread."""
        return sum(len(m.content) if isinstance(m.content, str) else 1000 for m in self.messages)

    def answer_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def wanted_logprobs(self) -> int | None:
        if self.top_logprobs and not self.logprobs:
            raise BadRequest("top_logprobs needs logprobs: true", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Common):
    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    def prompt_ids(self, preprocessor: Preprocessor) -> list[int]:
        prompt: Any = self.prompt
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            if len(prompt) > 1:
                raise BadRequest("several prompts in one request are not supported yet", param="prompt")
            prompt = prompt[0]
        ids = preprocessor.tokenize(prompt) if isinstance(prompt, str) else list(prompt)
        if not ids:
            raise BadRequest("the prompt is empty", param="prompt")
        vocab_size = preprocessor.tokenizer.get_vocab_size()
        if isinstance(prompt, list) and not all(0 <= id_ < vocab_size for id_ in ids):
            raise BadRequest(f"token ids must be between 0 and {vocab_size - 1}", param="prompt")
        return ids

    def prompt_size(self) -> int:
        return len(self.prompt) if isinstance(self.prompt, str) else sum(len(str(p)) for p in self.prompt)

    def wanted_logprobs(self) -> int | None:
        return self.logprobs


def parse_chat(body: bytes) -> ChatRequest:
    return _checked(ChatRequest, body)


def parse_completion(body: bytes) -> CompletionRequest:
    return _checked(CompletionRequest, body)


def _checked(model: type[R], body: bytes) -> R:
    """Raises BadRequest that names the first field that is wrong, in a sentence."""
    try:
        request = model.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        message = f"{where}: {first['msg']}" if where else f"the body is not a JSON object: {first['msg']}"
        raise BadRequest(message, param=where or None) from None
    request.refuse_unsupported()
    return request
