"""What a request of any API comes to: prompts as token ids, and for each answer how it is sampled, ended and rendered."""

from __future__ import annotations

import time
from secrets import token_hex
from typing import Literal

import msgspec

from dynserve.api.chat import ChatRequest, NamedTool
from dynserve.api.completions import DEFAULT_TOKENS, CompletionRequest, EmbeddingRequest, packed_prompts
from dynserve.api.fields import AnswerFields
from dynserve.api.grammar import enforces_calls, guide_of
from dynserve.dialects import reasoning
from dynserve.errors import BadRequest, ContextTooLong
from dynserve.text.preprocess import Preprocessor
from dynserve.wire.discovery import Card
from dynserve.wire.requests import Guide, Reasoning, Render, Sampling, Stop, Thought, ToolUse, pack_tokens

Kind = Literal["chat", "completion", "response", "message", "embedding"]
HEADS: dict[Kind, str] = {
    "chat": "chatcmpl-", "completion": "cmpl-", "response": "resp_", "message": "msg_", "embedding": "embd-",
}  # fmt: skip


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """One answer that is to be made."""

    tokens: bytes  # u32 little-endian
    sampling: Sampling
    stop: Stop
    render: Render
    guide: Guide | None = None
    pool: Literal["mean", "last"] | None = None

    def shortened(self, most: int) -> Part:
        if self.stop.max_tokens <= most:
            return self
        stop = msgspec.structs.replace(self.stop, max_tokens=most, min_tokens=min(self.stop.min_tokens, most))
        return msgspec.structs.replace(self, stop=stop)


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """All answers of one request: `group` of them for each prompt, of which the likeliest `keep` are shown."""

    parts: list[Part]
    group: int = 1
    keep: int = 1

    @property
    def render(self) -> Render:
        return self.parts[0].render

    @property
    def prompt_tokens(self) -> int:
        return sum(len(part.tokens) // 4 for part in self.parts[:: self.group])

    @property
    def answer_tokens(self) -> int:
        """The most tokens that all answers together can have."""
        return sum(part.stop.max_tokens for part in self.parts if part.pool is None)

    def limited(self, most: int) -> Order:
        """The same with at most so many tokens for each answer."""
        shorter = [part.shortened(most) for part in self.parts]
        return msgspec.structs.replace(self, parts=shorter)


class Prepared(msgspec.Struct, frozen=True):
    """Prompts after template and tokenizer, which may have run in a thread."""

    prompts: list[bytes]
    text: str = ""  # what the template made of a conversation


def prepare_chat(asked: ChatRequest, preprocessor: Preprocessor, max_seq_len: int, owner: str) -> Prepared:
    text, ids = preprocessor.chat(asked.conversation(), max_seq_len, owner)
    return Prepared([pack_tokens(ids)], text)


def prepare_prompts(
    asked: CompletionRequest | EmbeddingRequest, preprocessor: Preprocessor, max_seq_len: int, owner: str
) -> Prepared:
    prompts, field = (asked.prompt, "prompt") if isinstance(asked, CompletionRequest) else (asked.input, "input")
    return Prepared(packed_prompts(prompts, field, preprocessor, max_seq_len, owner))


def order_chat(
    asked: ChatRequest, prepared: Prepared, card: Card, preprocessor: Preprocessor, kind: Kind, frame: str = ""
) -> Order:
    """Raises BadRequest or ContextTooLong for what this model cannot do."""
    guide = guide_of(asked, card)
    thoughts = _reasoning(card, prepared.text, continued=asked.continue_final_message)
    if guide is not None and thoughts is not None:
        thought = _thought(thoughts, preprocessor)
        guide = msgspec.structs.replace(guide, thought=thought)
        if thought is None and thoughts.open:
            thoughts = None  # the grammar holds from the first token on: no thought can come
    render = msgspec.structs.replace(
        _render(asked, kind),
        logprobs=asked.wanted_logprobs(),
        reasoning=thoughts,
        tools=_tool_use(asked, card),
        frame=frame,
    )
    (tokens,) = prepared.prompts
    stop = asked.stops(len(tokens) // 4, card.max_seq_len, None)
    count = asked.n or 1

    def part(index: int) -> Part:
        sampling = asked.sampling(
            preprocessor.defaults, logprobs=render.logprobs, prompt_logprobs=False, choice=index
        )  # fmt: skip
        return Part(tokens=tokens, sampling=sampling, stop=stop, render=_numbered(render, index, count), guide=guide)

    return Order(parts=[part(index) for index in range(count)], group=count, keep=count)


def order_completion(asked: CompletionRequest, prepared: Prepared, card: Card, preprocessor: Preprocessor) -> Order:
    """Raises BadRequest or ContextTooLong for what this model cannot do."""
    guide = guide_of(asked, card)
    keep = asked.n or 1
    group = asked.best_of or keep
    render = msgspec.structs.replace(_render(asked, "completion"), logprobs=asked.logprobs, echo=bool(asked.echo))
    count = len(prepared.prompts) * group
    # the likeliest can only be told by their log-probabilities
    logprobs = 0 if group > keep and asked.logprobs is None else asked.logprobs
    prompt_logprobs = bool(asked.echo) and asked.logprobs is not None
    parts = []
    for at, tokens in enumerate(prepared.prompts):
        stop = asked.stops(len(tokens) // 4, card.max_seq_len, DEFAULT_TOKENS)
        for choice in range(group):
            sampling = asked.sampling(
                preprocessor.defaults, logprobs=logprobs, prompt_logprobs=prompt_logprobs, choice=choice
            )  # fmt: skip
            numbered = _numbered(render, at * group + choice, count)
            parts.append(Part(tokens=tokens, sampling=sampling, stop=stop, render=numbered, guide=guide))
    return Order(parts=parts, group=group, keep=keep)


def order_embedding(asked: EmbeddingRequest, prepared: Prepared, card: Card) -> Order:
    """Raises BadRequest or ContextTooLong for what this model cannot do."""
    if not card.pooling:
        raise BadRequest(f"the workers of {asked.model} make no embeddings", param="model")
    if asked.dimensions is not None and asked.dimensions > card.embedding_size:
        raise BadRequest(
            f"dimensions: {asked.dimensions} is more than the {card.embedding_size} that this model has",
            param="dimensions",
        )
    render = Render(
        kind="embedding",
        response_id=HEADS["embedding"] + token_hex(16),
        model=asked.model,
        created=int(time.time()),
        dimensions=asked.dimensions or 0,
        base64=asked.encoding_format == "base64",
    )
    parts = []
    for at, tokens in enumerate(prepared.prompts):
        if len(tokens) // 4 >= card.max_seq_len:
            raise ContextTooLong(
                f"This model's maximum context length is {card.max_seq_len} tokens. However, input {at} has "
                f"{len(tokens) // 4} tokens. Please shorten it.",
                param="input",
            )
        parts.append(
            Part(
                tokens=tokens,
                sampling=Sampling(temperature=0.0),
                stop=Stop(max_tokens=1),
                render=msgspec.structs.replace(render, index=at, part=True),
                pool=card.pooling,
            )
        )
    return Order(parts=parts)


def _render(asked: AnswerFields, kind: Kind) -> Render:
    """What answers of text have in common."""
    options = asked.stream_options
    return Render(
        kind=kind,
        response_id=HEADS[kind] + token_hex(16),
        model=asked.model,
        created=int(time.time()),
        stream=bool(asked.stream),
        usage=options is not None and options.include_usage,
        continuous_usage=options is not None and options.continuous_usage_stats,
        skip_special_tokens=asked.skip_special_tokens,
    )


def _numbered(render: Render, index: int, count: int) -> Render:
    return render if count == 1 else msgspec.structs.replace(render, index=index, part=True)


def _reasoning(card: Card, prompt: str, *, continued: bool) -> Reasoning | None:
    parser = card.reasoning_parser
    if not parser:
        return None
    return Reasoning(parser=parser, open=reasoning.is_open(parser, prompt, continued=continued))


def _thought(thoughts: Reasoning, preprocessor: Preprocessor) -> Thought | None:
    """Where a grammar waits for the end of a thought; only tokens of their own can be seen by the engine. Where it is the
    template that opens thoughts, a prompt without an open one asks for none."""
    if not thoughts.open and preprocessor.opens_thoughts:
        return None
    begin, end = (preprocessor.tokenizer.token_to_id(tag) for tag in (reasoning.BEGIN, reasoning.END))
    if begin is None or end is None:
        return None
    return Thought(begin=begin, end=end, open=thoughts.open)


def _tool_use(asked: ChatRequest, card: Card) -> ToolUse | None:
    tools = asked.callable_tools()
    if not tools:
        return None
    return ToolUse(
        parser=card.tool_parser,
        names=tuple(tool.function.name for tool in tools),
        enforced=asked.must_call or enforces_calls(card),
        named=isinstance(asked.tool_choice, NamedTool),
    )
