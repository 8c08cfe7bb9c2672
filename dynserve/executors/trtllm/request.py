"""A `GenerateRequest` as TensorRT-LLM's parameters: `SamplingParams` and the keywords of `generate_async`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from dynserve.dialects import reasoning
from dynserve.errors import BadRequest, Unavailable
from dynserve.executors.trtllm.api import Api
from dynserve.executors.trtllm.arguments import XGRAMMAR
from dynserve.wire.requests import GenerateRequest, Grammar, unpack_tokens

DEFAULT_PRIORITY = 0.5  # TensorRT-LLM's


class Adapter(NamedTuple):
    """A LoRA adapter that this worker serves."""

    number: int  # from 1 on
    path: str
    source: str = "hf"  # the form of its files: of Hugging Face, or nemo


class Terms(NamedTuple):
    """The settings that all requests to one rank share."""

    api: Api
    eos: tuple[int, ...]
    vocab_size: int
    adapters: Mapping[str, Adapter]
    rank: int | None  # the attention-DP rank; None without attention DP
    grammar_backend: str | None = XGRAMMAR
    priorities: bool = False  # the engine's waiting queue is ordered by priority
    conversations: bool = False  # the engine keeps a conversation on one rank


def terms_of(
    api: Api, args: Any, adapters: Mapping[str, str], eos: tuple[int, ...], vocab_size: int, rank: int | None
) -> Terms:
    """Returns the terms of an engine with these arguments. `adapters`: folder by name."""
    source = getattr(args.lora_config, "lora_ckpt_source", "hf")
    return Terms(
        api,
        eos,
        vocab_size,
        {name: Adapter(number, path, source) for number, (name, path) in enumerate(adapters.items(), 1)},
        rank,
        grammar_backend=args.guided_decoding_backend,
        priorities=getattr(args.scheduler_config, "waiting_queue_policy", "fcfs") == "priority",
        conversations=bool(getattr(args.attention_dp_config, "kv_cache_routing_conversation_affinity", False)),
    )


def sampling_of(request: GenerateRequest, terms: Terms, *, max_tokens: int, min_tokens: int) -> Any:
    """Returns a new `SamplingParams`: the context phase writes into it.

    Raises:
        BadRequest: a token id is not in the vocabulary, or the engine's grammar backend cannot take the grammar.
    """
    sampling = request.sampling
    end, others = ends_of(request, terms.eos)
    keywords: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": 0.0 if sampling.greedy else sampling.temperature,  # unset would be greedy
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "seed": sampling.seed,
        # -1 means none; `ignore_eos` would drop the other stop tokens as well
        "end_id": end,
        "pad_id": max(0, end),
        "detokenize": False,
        "return_perf_metrics": True,
    }
    optional = {
        "min_p": sampling.min_p or None,
        "min_tokens": min_tokens or None,
        "stop_token_ids": others or None,
        "presence_penalty": sampling.presence_penalty or None,
        "frequency_penalty": sampling.frequency_penalty or None,
        "repetition_penalty": sampling.repetition_penalty if sampling.repetition_penalty != 1.0 else None,
        # 0 returns none in version 1.2; `Cursor` returns as many as were requested
        "logprobs": max(1, sampling.logprobs) if sampling.logprobs is not None else None,
        # a decode request has no logits of its prompt
        "prompt_logprobs": max(1, sampling.logprobs or 0) if wants_prompt(request) else None,
        "embedding_bias": _bias(sampling.logit_bias, terms.vocab_size) if sampling.logit_bias else None,
        "guided_decoding": _grammar_params(request.grammar, terms) if request.grammar is not None else None,
    }
    keywords |= {name: value for name, value in optional.items() if value is not None}
    return terms.api.sampling(**keywords)


def keywords_of(request: GenerateRequest, terms: Terms, disaggregated: Any) -> dict[str, Any]:
    """Returns the other keywords of `generate_async` that this version has.

    Raises:
        Unavailable: this worker does not have the adapter.
    """
    api = terms.api
    found: dict[str, Any] = {"disaggregated_params": disaggregated}
    if salt := salt_of(request):
        found["cache_salt"] = salt
    if request.priority and terms.priorities:
        found["priority"] = priority_of(request.priority)
    if request.trace_headers:
        found["trace_headers"] = request.trace_headers
    talks = bool(request.session) and terms.conversations and api.conversation is not None
    if talks:
        found["conversation_params"] = api.conversation(conversation_id=request.session)
    if terms.rank is not None:  # a conversation stays on the rank of its first turn, which may be another one
        found["scheduling_params"] = api.scheduling(attention_dp_rank=terms.rank, attention_dp_relax=talks)
    if request.adapter:
        adapter = terms.adapters.get(request.adapter)
        if adapter is None:
            raise Unavailable(f"this worker has no adapter {request.adapter!r}")
        found["lora_request"] = lora_request(api, request.adapter, adapter)
    return {name: value for name, value in found.items() if name in api.keywords and value is not None}


def lora_request(api: Api, name: str, adapter: Adapter) -> Any:
    return api.lora(name, adapter.number, adapter.path, adapter.source)


def prompt_of(request: GenerateRequest, *, prior: int = 0) -> list[int]:
    """Returns the prompt's token ids, followed by the first `prior` tokens that were generated already."""
    return unpack_tokens(request.prompt) + request.prior_tokens[:prior]


def salt_of(request: GenerateRequest) -> str:
    """Returns the cache salt. With `prompt_logprobs` it is unique, since cached prompt tokens have no logits."""
    if request.sampling.prompt_logprobs:
        return f"{request.cache_salt}:whole:{request.id}"
    return request.cache_salt


def wants_prompt(request: GenerateRequest) -> bool:
    """Whether the prompt's log-probabilities are requested and not returned yet."""
    return request.sampling.prompt_logprobs and request.prior is None


def priority_of(priority: int) -> float:
    """Maps any integer to TensorRT-LLM's (0, 1), keeping the order; 0 maps to the default."""
    return DEFAULT_PRIORITY + 0.5 * priority / (1 + abs(priority))


def ends_of(request: GenerateRequest, eos: tuple[int, ...]) -> tuple[int, list[int]]:
    """Returns the engine's one end of turn (-1: none), and the stop tokens, with the model's other ends of turn."""
    stop = request.stop
    if (stop.ignore_eos and request.grammar is None) or not eos:
        return -1, list(stop.token_ids)
    return eos[0], [*eos[1:], *(token for token in stop.token_ids if token not in eos)]


def _bias(biases: dict[int, float], vocab_size: int) -> Any:
    import torch  # imported by TensorRT-LLM already

    if wrong := [token for token in biases if not 0 <= token < vocab_size]:
        raise BadRequest(f"logit_bias: token {wrong[0]} is not one of 0 to {vocab_size - 1}", param="logit_bias")
    tensor = torch.zeros(vocab_size, dtype=torch.float32)
    tensor[list(biases)] = torch.tensor(list(biases.values()), dtype=torch.float32)
    return tensor


def _grammar_params(grammar: Grammar, terms: Terms) -> Any:
    if terms.grammar_backend != XGRAMMAR and (grammar.reasoning is not None or grammar.kind not in ("json", "regex")):
        raise BadRequest(
            f"guided_decoding_backend {terms.grammar_backend} takes JSON schemas and regular expressions, of models that "
            f"do not reason; set {XGRAMMAR} in the engine options for this request",
            param="response_format",
        )
    if grammar.reasoning is None:
        if grammar.rules and terms.grammar_backend == XGRAMMAR:
            kind = "grammar" if grammar.kind == "json" else grammar.kind
            return terms.api.grammar(**{kind: grammar.rules})
        return terms.api.grammar(**{grammar.kind: grammar.text})
    return terms.api.grammar(structural_tag=behind_reasoning(grammar, open_=grammar.reasoning.open))


def behind_reasoning(grammar: Grammar, *, open_: bool) -> str:
    """Returns a structural tag that lets a model reason before its answer follows the grammar. The engine enforces grammars
    from the first token, and its `reasoning_parser` does not change that.

    `open_`: the prompt has already opened the reasoning. Otherwise the model may reason, or answer at once.

    Raises:
        BadRequest: the grammar is a structural tag without a `format`.
    """
    answer = _format(grammar)
    thought = {"type": "tag", "begin": "" if open_ else reasoning.BEGIN, "content": {"type": "any_text"}}
    space = {"type": "regex", "pattern": "[ \\n]*"}  # the grammar itself allows none before the answer
    behind = {"type": "sequence", "elements": [{**thought, "end": reasoning.END}, space, answer]}
    found = behind if open_ else {"type": "or", "elements": [behind, answer]}
    return json.dumps({"type": "structural_tag", "format": found})


def _format(grammar: Grammar) -> Any:
    """Returns the grammar as a part of a structural tag (xgrammar's formats)."""
    match grammar.kind:
        case "json":
            if grammar.rules:
                return {"type": "grammar", "grammar": grammar.rules}
            return {"type": "json_schema", "json_schema": json.loads(grammar.text)}
        case "regex":
            return {"type": "regex", "pattern": grammar.text}
        case "grammar":
            return {"type": "grammar", "grammar": grammar.text}
    found = json.loads(grammar.rules or grammar.text)
    if "format" not in found:
        raise BadRequest("a structural tag needs a format", param="response_format")
    return found["format"]
