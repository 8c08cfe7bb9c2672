"""The normal form of a request of any API: one `Generation` per answer, which a worker can run."""

from __future__ import annotations

import time
from secrets import token_hex
from typing import Literal

import msgspec

from dynserve.api.chat import ChatRequest, NamedTool
from dynserve.api.completions import DEFAULT_TOKENS, CompletionRequest, EmbeddingRequest, packed_prompts
from dynserve.api.fields import AnswerFields
from dynserve.api.grammar import enforced, enforces_calls, grammar_of
from dynserve.dialects import reasoning as tags
from dynserve.errors import BadRequest, ContextTooLong
from dynserve.text.preprocess import Preprocessor
from dynserve.wire.discovery import Card
from dynserve.wire.requests import (
    Generation,
    ReasoningParsing,
    ReasoningTokens,
    RenderOptions,
    SamplingParams,
    StopConditions,
    ToolParsing,
    num_tokens,
    pack_tokens,
)

Kind = Literal["chat", "completion", "response", "message", "embedding"]
ApiRequest = ChatRequest | CompletionRequest | EmbeddingRequest
ID_PREFIXES: dict[Kind, str] = {
    "chat": "chatcmpl-", "completion": "cmpl-", "response": "resp_", "message": "msg_", "embedding": "embd-",
}  # fmt: skip


class NormalizedRequest(msgspec.Struct, frozen=True, kw_only=True):
    """All answers to one request: `group` of them for each prompt, of which the `keep` likeliest are shown."""

    choices: list[Generation]
    group: int = 1
    keep: int = 1
    dropped: list[str] = []  # words of tools' schemas that no grammar holds the answers to

    @property
    def render(self) -> RenderOptions:
        return self.choices[0].render

    @property
    def prompt_tokens(self) -> int:
        return sum(choice.num_tokens for choice in self.choices[:: self.group])

    @property
    def max_answer_tokens(self) -> int:
        """The most tokens that all answers together can have."""
        return sum(choice.stop.max_tokens for choice in self.choices if choice.pooling is None)

    def limited(self, max_tokens: int) -> NormalizedRequest:
        """The same request with at most `max_tokens` for each answer."""
        return msgspec.structs.replace(self, choices=[_limited(choice, max_tokens) for choice in self.choices])


class TokenizedPrompts(msgspec.Struct, frozen=True):
    """The prompts of a request after template and tokenizer."""

    prompts: list[bytes]  # token ids as little-endian u32
    text: str = ""  # a conversation, as the template rendered it


def normalize(
    request: ApiRequest, preprocessor: Preprocessor, card: Card, cache_owner: str, kind: Kind, frame: str = ""
) -> NormalizedRequest:
    """Tokenises and checks a request for one model. Takes milliseconds for a long prompt, so it may run in a thread.

    `cache_owner` is that of `Segments.encode`. `frame` holds the constant fields of a Responses answer, as JSON.

    Raises:
        BadRequest, ContextTooLong: this model cannot serve the request.
    """
    prompts = tokenize_prompts(request, preprocessor, card.max_seq_len, cache_owner)
    if isinstance(request, ChatRequest):
        return _normalize_chat(request, prompts, card, preprocessor, kind, frame)
    if isinstance(request, EmbeddingRequest):
        return _normalize_embedding(request, prompts, card)
    return _normalize_completion(request, prompts, card, preprocessor)


def tokenize_prompts(
    request: ApiRequest, preprocessor: Preprocessor, max_seq_len: int, cache_owner: str
) -> TokenizedPrompts:
    """Returns the token ids of every prompt of a request. Raises BadRequest and ContextTooLong."""
    if isinstance(request, ChatRequest):
        text, ids = preprocessor.chat(request.conversation(), max_seq_len, cache_owner)
        return TokenizedPrompts([pack_tokens(ids)], text)
    if isinstance(request, EmbeddingRequest):
        return TokenizedPrompts(packed_prompts(request.input, "input", preprocessor, max_seq_len, cache_owner))
    return TokenizedPrompts(packed_prompts(request.prompt, "prompt", preprocessor, max_seq_len, cache_owner))


def _normalize_chat(
    request: ChatRequest, tokenized: TokenizedPrompts, card: Card, preprocessor: Preprocessor, kind: Kind, frame: str
) -> NormalizedRequest:
    grammar, dropped = enforced(request, card)
    parsing = _reasoning_parsing(card, tokenized.text, continued=request.continue_final_message)
    if grammar is not None and parsing is not None:
        tokens = _reasoning_tokens(parsing, preprocessor)
        grammar = msgspec.structs.replace(grammar, reasoning=tokens)
        if tokens is None and parsing.open:
            parsing = None  # the grammar applies from the first token on, which rules out reasoning
    render = msgspec.structs.replace(
        _render_options(request, kind),
        logprobs=request.wanted_logprobs(),
        reasoning=parsing,
        tools=_tool_parsing(request, card),
        frame=frame,
    )
    (prompt,) = tokenized.prompts
    stop = request.stops(num_tokens(prompt), card.max_seq_len, None, preprocessor.special_ids)
    count = request.n or 1

    def choice(index: int) -> Generation:
        sampling = request.sampling(
            preprocessor.defaults, logprobs=render.logprobs, prompt_logprobs=False, choice=index
        )  # fmt: skip
        numbered = _numbered(render, index, count)
        return Generation(prompt=prompt, sampling=sampling, stop=stop, render=numbered, grammar=grammar)

    return NormalizedRequest(
        choices=[choice(index) for index in range(count)], group=count, keep=count, dropped=dropped
    )


def _normalize_completion(
    request: CompletionRequest, tokenized: TokenizedPrompts, card: Card, preprocessor: Preprocessor
) -> NormalizedRequest:
    grammar = grammar_of(request, card)
    keep = request.n or 1
    group = request.best_of or keep
    echo = bool(request.echo)
    render = msgspec.structs.replace(_render_options(request, "completion"), logprobs=request.logprobs, echo=echo)
    count = len(tokenized.prompts) * group
    # choosing the likeliest answers needs their log-probabilities
    logprobs = 0 if group > keep and request.logprobs is None else request.logprobs
    prompt_logprobs = echo and request.logprobs is not None
    choices = []
    for at, prompt in enumerate(tokenized.prompts):
        stop = request.stops(num_tokens(prompt), card.max_seq_len, DEFAULT_TOKENS, preprocessor.special_ids)
        for number in range(group):
            sampling = request.sampling(
                preprocessor.defaults, logprobs=logprobs, prompt_logprobs=prompt_logprobs, choice=number
            )  # fmt: skip
            numbered = _numbered(render, at * group + number, count)
            choices.append(Generation(prompt=prompt, sampling=sampling, stop=stop, render=numbered, grammar=grammar))
    return NormalizedRequest(choices=choices, group=group, keep=keep)


def _normalize_embedding(request: EmbeddingRequest, tokenized: TokenizedPrompts, card: Card) -> NormalizedRequest:
    if not card.pooling:
        raise BadRequest(f"the workers of {request.model} do not compute embeddings", param="model")
    if request.dimensions is not None and request.dimensions > card.embedding_size:
        raise BadRequest(
            f"dimensions: {request.dimensions} is more than the {card.embedding_size} dimensions of this model",
            param="dimensions",
        )
    render = RenderOptions(
        kind="embedding",
        response_id=ID_PREFIXES["embedding"] + token_hex(16),
        model=request.model,
        created=int(time.time()),
        dimensions=request.dimensions or 0,
        base64=request.encoding_format == "base64",
    )
    choices = []
    for at, prompt in enumerate(tokenized.prompts):
        if num_tokens(prompt) >= card.max_seq_len:
            raise ContextTooLong(
                f"This model's maximum context length is {card.max_seq_len} tokens. However, input {at} has "
                f"{num_tokens(prompt)} tokens. Please shorten it.",
                param="input",
            )
        choices.append(
            Generation(
                prompt=prompt,
                sampling=SamplingParams(temperature=0.0),
                stop=StopConditions(max_tokens=1),
                render=msgspec.structs.replace(render, index=at, part=True),
                pooling=card.pooling,
            )
        )
    return NormalizedRequest(choices=choices)


def _limited(choice: Generation, max_tokens: int) -> Generation:
    stop = choice.stop
    if stop.max_tokens <= max_tokens:
        return choice
    stop = msgspec.structs.replace(stop, max_tokens=max_tokens, min_tokens=min(stop.min_tokens, max_tokens))
    return msgspec.structs.replace(choice, stop=stop)


def _render_options(request: AnswerFields, kind: Kind) -> RenderOptions:
    """The options that the answers of all text APIs share."""
    options = request.stream_options
    return RenderOptions(
        kind=kind,
        response_id=ID_PREFIXES[kind] + token_hex(16),
        model=request.model,
        created=int(time.time()),
        stream=bool(request.stream),
        usage=options is not None and options.include_usage,
        continuous_usage=options is not None and options.continuous_usage_stats,
        skip_special_tokens=request.skip_special_tokens,
    )


def _numbered(render: RenderOptions, index: int, count: int) -> RenderOptions:
    return render if count == 1 else msgspec.structs.replace(render, index=index, part=True)


def _reasoning_parsing(card: Card, prompt: str, *, continued: bool) -> ReasoningParsing | None:
    parser = card.reasoning_parser
    if not parser:
        return None
    return ReasoningParsing(parser=parser, open=tags.is_open(parser, prompt, continued=continued))


def _reasoning_tokens(parsing: ReasoningParsing, preprocessor: Preprocessor) -> ReasoningTokens | None:
    """The token ids of the tags after which a grammar begins; None where a tag is not a single token, which an engine could
    not detect, and where the template opens reasoning but did not do so in this prompt."""
    if not parsing.open and preprocessor.opens_reasoning:
        return None
    begin, end = (preprocessor.tokenizer.token_to_id(tag) for tag in (tags.BEGIN, tags.END))
    if begin is None or end is None:
        return None
    return ReasoningTokens(begin=begin, end=end, open=parsing.open)


def _tool_parsing(request: ChatRequest, card: Card) -> ToolParsing | None:
    tools = request.callable_tools()
    if not tools:
        return None
    return ToolParsing(
        parser=card.tool_parser,
        names=tuple(tool.name for tool in tools),
        enforced=request.must_call or enforces_calls(card),
        named=isinstance(request.tool_choice, NamedTool),
        client_names=request.tool_names(),
    )
