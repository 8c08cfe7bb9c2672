"""The fields that requests of several APIs share, their bounds, and the error messages for invalid requests."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from secrets import randbits
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from dynserve.api.left_out import Part, unknown_fields
from dynserve.config import nearest
from dynserve.errors import BadRequest, ContextTooLong
from dynserve.wire.requests import SamplingParams, StopConditions

MAX_STOPS = 16
MAX_STOP_LENGTH = 256  # characters
MAX_STOP_IDS = 1024
MAX_CHOICES = 4096
MAX_N = 128
MAX_INT = 2**31 - 1
SCHEMA_WORK = 4  # characters of a prompt that are as much work as one of a schema that becomes a grammar
Priority = Annotated[int, Field(ge=-(2**63), lt=2**63)]
TokenId = Annotated[int, Field(ge=0, le=MAX_INT)]
Count = Annotated[int, Field(ge=1, le=MAX_INT)]
StopString = Annotated[str, Field(max_length=MAX_STOP_LENGTH)]
M = TypeVar("M", bound="Request")
T = TypeVar("T")
# a list whose validation stops at the first invalid item: a list of a million could raise a million errors
Many = Annotated[list[T], Field(fail_fast=True)]
MAX_BIASES = 1024


def _unless_null(default: bool) -> BeforeValidator:
    return BeforeValidator(lambda given: default if given is None else given)


# flags for which clients may send null, which means that the field is absent
Off = Annotated[bool, _unless_null(False)]
On = Annotated[bool, _unless_null(True)]


def _few(biases: Any) -> Any:
    """Checks the number of entries before each entry is validated."""
    if isinstance(biases, dict) and len(biases) > MAX_BIASES:
        raise ValueError(f"{len(biases)} entries, at most {MAX_BIASES} are possible")
    return biases


class Request(BaseModel):
    """The body of a POST. Unknown fields are stored separately: clients written for other servers send many."""

    model_config = ConfigDict(extra="allow")
    # field of another server, or a former one of OpenAI -> the alternative to it
    refused: ClassVar[Mapping[str, str]] = {}

    model: str

    @property
    def unknown(self) -> list[str]:
        """The names of the fields that are unknown, at every depth, and of the entries that are left out."""
        unknown, left_out = unknown_fields(self), self.left_out()
        return unknown + left_out if left_out else unknown

    def left_out(self) -> list[str]:
        """The names of entries without a meaning here, such as tools that only another server runs."""
        return []

    def check(self) -> None:
        """Checks the fields together. Raises BadRequest for an unsupported field or a contradiction between fields."""
        extra = self.model_extra
        if not extra:
            return
        for name, advice in self.refused.items():
            if extra.get(name) not in (None, [], {}, False, ""):
                raise BadRequest(f"{name} is not supported; {advice}", param=name)

    def refuse_unknown(self) -> None:
        """Raises BadRequest for an unknown field. Called where the server is configured to refuse such fields."""
        if unknown := unknown_fields(self):
            name = unknown[0]
            raise BadRequest(f"unknown field {name[:100]}{nearest(name[:100], type(self).model_fields)}", param=name)


class SamplingFields(Request):
    """The fields for sampling and for the end of the answer: OpenAI's, and those of other servers."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_INT)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: int | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    logit_bias: Annotated[dict[TokenId, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(_few)] | None = None
    stop: StopString | Annotated[Many[StopString], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[Many[TokenId], Field(max_length=MAX_STOP_IDS)] | None = None
    include_stop_str_in_output: Off = False
    skip_special_tokens: On = True
    min_tokens: Annotated[int, Field(ge=0, le=MAX_INT)] | None = None
    max_tokens: Count | None = None
    ignore_eos: Off = False
    cache_salt: Annotated[str, Field(max_length=1024)] | None = None
    priority: Priority | None = None
    # accepted and ignored
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_retention: str | None = None
    # requests with the same key go to the same workers
    prompt_cache_key: Annotated[str, Field(max_length=256)] | None = None

    def sampling(
        self, defaults: SamplingParams, *, logprobs: int | None, prompt_logprobs: bool, choice: int
    ) -> SamplingParams:
        """Returns the request's fields, with the model's defaults for missing ones. A missing seed is drawn here, so that
        every worker uses the same one; each choice has its own."""

        def own(value: Any, default: Any) -> Any:
            return default if value is None else value

        top_p, top_k = own(self.top_p, defaults.top_p), max(0, own(self.top_k, defaults.top_k))
        if top_p == 0:  # the smallest set of tokens: the likeliest one. Not every engine accepts 0
            top_p, top_k = 1.0, 1

        return SamplingParams(
            temperature=own(self.temperature, defaults.temperature),
            top_p=top_p,
            top_k=top_k,
            min_p=own(self.min_p, defaults.min_p),
            seed=(randbits(63) if self.seed is None else self.seed + choice) & 0x7FFFFFFFFFFFFFFF,
            presence_penalty=own(self.presence_penalty, 0.0),
            frequency_penalty=own(self.frequency_penalty, 0.0),
            repetition_penalty=own(self.repetition_penalty, defaults.repetition_penalty),
            logit_bias=self.logit_bias or {},
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )

    def stops(
        self, prompt_tokens: int, max_seq_len: int, default_max_tokens: int | None, special: Mapping[str, int]
    ) -> StopConditions:
        """Returns the conditions that end the answer. `special`: the ids of the special tokens, whose text an answer does
        not show: a stop string that is one of them is that token. Raises ContextTooLong when the prompt fills the context.
        """
        room = max_seq_len - prompt_tokens
        if room < 1:
            raise ContextTooLong(
                f"This model's maximum context length is {max_seq_len} tokens. However, your prompt has {prompt_tokens} "
                "tokens. Please shorten it.",
                param=self.prompt_field,
            )
        wanted = self.answer_tokens()
        if wanted is None:
            wanted = default_max_tokens or room
        strings = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        token_ids = self.stop_token_ids or ()
        if strings:
            token_ids = [*token_ids, *(special[string] for string in strings if string in special)]
        return StopConditions(
            max_tokens=min(wanted, room),
            min_tokens=min(self.min_tokens or 0, wanted, room),
            strings=tuple(string for string in strings if string),
            token_ids=tuple(token_ids),
            ignore_eos=self.ignore_eos,
            include_string=self.include_stop_str_in_output,
        )

    prompt_field: ClassVar[str] = "prompt"

    def answer_tokens(self) -> int | None:
        return self.max_tokens

    def bounds_answer(self) -> bool:
        """Whether the client has set a maximum length of the answer."""
        return bool(self.answer_tokens())


class StreamOptions(Part):
    include_usage: Off = False
    continuous_usage_stats: Off = False
    include_obfuscation: bool | None = None  # OpenAI's padding against traffic analysis; ignored here


class JsonSchema(Part):
    model_config = ConfigDict(extra="allow", populate_by_name=True)
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Part):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class AnswerFields(SamplingFields):
    """The fields that chats and completions share besides sampling: streams, choices and grammars."""

    stream: bool | None = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_grammar: str | None = None
    guided_choice: Annotated[Many[str], Field(min_length=1, max_length=MAX_CHOICES)] | None = None

    refused: ClassVar[Mapping[str, str]] = {
        # constraints of other servers: an answer without them would look like one with them
        "structured_outputs": "use response_format, guided_regex, guided_grammar or guided_choice",
        "structural_tag": "use response_format or tools",
        "regex": "use guided_regex",
        "ebnf": "use guided_grammar",
        "json_schema": "use response_format",
        "guided_whitespace_pattern": "the white space of grammars is bounded, and cannot be chosen",
        "bad_words": "use logit_bias",
        "allowed_token_ids": "use guided_choice or guided_regex",
    }

    def check(self) -> None:
        super().check()
        options = self.stream_options
        if options is not None and (options.include_usage or options.continuous_usage_stats) and not self.stream:
            raise BadRequest("stream_options needs stream: true", param="stream_options")
        most = self.answer_tokens()
        if self.min_tokens is not None and most is not None and self.min_tokens > most:
            raise BadRequest(f"min_tokens: {self.min_tokens} is more than max_tokens, {most}", param="min_tokens")
        form = self.response_format
        schema = form.json_schema.schema_ if form is not None and form.json_schema is not None else None
        if form is not None and form.type == "json_schema" and schema is None:
            raise BadRequest("response_format of type json_schema needs json_schema.schema", param="response_format")
        given = self.grammar_fields()
        if len(given) > 1:
            raise BadRequest(f"{given[0]} and {given[1]} exclude each other; send only one of them", param=given[1])

    def schema_size(self) -> int:
        """The work on the schema of the answer, in characters of a prompt; 0 without one."""
        schema = self.response_format or self.guided_json
        return SCHEMA_WORK * len(str(schema)) if schema else 0

    def grammar_fields(self) -> list[str]:
        """The names of the fields that set a grammar and are present."""
        formed = self.response_format is not None and self.response_format.type != "text"
        fields = ("guided_json", "guided_regex", "guided_grammar", "guided_choice")
        return ["response_format"] * formed + [name for name in fields if getattr(self, name) is not None]


def parsed(model: type[M], body: bytes | bytearray) -> M:
    """Parses and checks a body. Raises BadRequest with the name of the first invalid field."""
    return validated(lambda: model.model_validate_json(body))


def validated(make: Callable[[], M]) -> M:
    """Returns the request that `make` creates, once it is checked. Raises what `parsed` raises."""
    try:
        request = make()
    except ValidationError as error:
        raise bad_request(error) from None
    except RecursionError:
        raise BadRequest("the body is nested too deeply") from None
    request.check()
    return request


def bad_request(error: ValidationError) -> BadRequest:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"] if isinstance(part, int) or _is_field(part))
    message = f"{where}: {first['msg']}" if where else f"the body is not a JSON object: {first['msg']}"
    return BadRequest(message, param=where or None)


def _is_field(part: str) -> bool:
    """Whether a part of an error's location is a field. Other parts are union members, such as `list[int]`."""
    return re.fullmatch(r"[a-z_][a-z0-9_]*", part) is not None and part not in _TYPES


_TYPES = {"str", "int", "float", "bool", "list", "dict", "none"}
