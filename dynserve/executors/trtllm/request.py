"""A `GenerateRequest` in TensorRT-LLM's words: `SamplingParams` and the keywords of `generate_async`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from dynserve.errors import BadRequest, Unavailable
from dynserve.executors.trtllm.api import Api
from dynserve.wire.requests import GenerateRequest, Grammar, unpack_tokens

DEFAULT_PRIORITY = 0.5  # TensorRT-LLM's


class Adapter(NamedTuple):
    """A LoRA adapter that this worker serves."""

    number: int  # from 1 on
    path: str


class Terms(NamedTuple):
    """What all requests to one engine share."""

    api: Api
    eos: tuple[int, ...]
    vocab_size: int
    knows_reasoning: bool  # the engine knows where a thought ends, so that a grammar can begin behind it
    adapters: Mapping[str, Adapter]
    rank: int | None  # of attention data parallelism


def sampling_of(request: GenerateRequest, terms: Terms, *, max_tokens: int, min_tokens: int) -> Any:
    """A `SamplingParams` of its own: the context phase writes into it.

    Raises:
        BadRequest: a token id that the vocabulary does not have, or a grammar that cannot be held behind a thought.
    """
    sampling = request.sampling
    end, others = ends_of(request, terms.eos)
    keywords: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": 0.0 if sampling.greedy else sampling.temperature,  # unset would be greedy
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "seed": sampling.seed,
        # -1 is never; `ignore_eos` would drop the other stop tokens as well
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
        "logprobs": sampling.logprobs,
        # 0 would give none of them; a decode request has no states of its prompt
        "prompt_logprobs": max(1, sampling.logprobs or 0) if wants_prompt(request) else None,
        "embedding_bias": _bias(sampling.logit_bias, terms.vocab_size) if sampling.logit_bias else None,
        "guided_decoding": _grammar_params(request.grammar, terms) if request.grammar is not None else None,
    }
    keywords |= {name: value for name, value in optional.items() if value is not None}
    return terms.api.sampling(**keywords)


def keywords_of(request: GenerateRequest, terms: Terms, disaggregated: Any) -> dict[str, Any]:
    """The other keywords of `generate_async`, as far as this version has them.

    Raises:
        Unavailable: an adapter that this worker does not have.
    """
    api = terms.api
    found: dict[str, Any] = {"disaggregated_params": disaggregated}
    if salt := salt_of(request):
        found["cache_salt"] = salt
    if request.priority:
        found["priority"] = priority_of(request.priority)
    if terms.rank is not None:
        found["scheduling_params"] = api.scheduling(attention_dp_rank=terms.rank, attention_dp_relax=False)
    if request.adapter:
        adapter = terms.adapters.get(request.adapter)
        if adapter is None:
            raise Unavailable(f"this worker has no adapter {request.adapter!r}")
        found["lora_request"] = api.lora(request.adapter, adapter.number, adapter.path)
    return {name: value for name, value in found.items() if name in api.keywords and value is not None}


def prompt_of(request: GenerateRequest, *, prior: bool = False) -> list[int]:
    """Token ids; with `prior`, what was generated already behind the prompt."""
    tokens = unpack_tokens(request.prompt)
    return tokens + request.prior.token_ids if prior and request.prior is not None else tokens


def salt_of(request: GenerateRequest) -> str:
    """A request that looks at its whole prompt must find nothing of it in the cache: tokens there have no logits."""
    if request.sampling.prompt_logprobs:
        return f"{request.cache_salt}:whole:{request.id}"
    return request.cache_salt


def wants_prompt(request: GenerateRequest) -> bool:
    """Whether log-probabilities of the prompt are to come, and have not come yet."""
    return request.sampling.prompt_logprobs and request.prior is None


def priority_of(priority: int) -> float:
    """Any whole number into TensorRT-LLM's (0, 1), in order; 0 is the default."""
    return DEFAULT_PRIORITY + 0.5 * priority / (1 + abs(priority))


def ends_of(request: GenerateRequest, eos: tuple[int, ...]) -> tuple[int, list[int]]:
    """What ends an answer: the engine has one end of turn (-1: none), a model's others are stop tokens."""
    stop = request.stop
    if (stop.ignore_eos and request.grammar is None) or not eos:
        return -1, list(stop.token_ids)
    return eos[0], [*eos[1:], *(token for token in stop.token_ids if token not in eos)]


def _bias(biases: dict[int, float], vocab_size: int) -> Any:
    import torch  # TensorRT-LLM has brought it in long ago

    if wrong := [token for token in biases if not 0 <= token < vocab_size]:
        raise BadRequest(f"logit_bias: token {wrong[0]} is not one of 0 to {vocab_size - 1}", param="logit_bias")
    tensor = torch.zeros(vocab_size, dtype=torch.float32)
    tensor[list(biases)] = torch.tensor(list(biases.values()), dtype=torch.float32)
    return tensor


def _grammar_params(grammar: Grammar, terms: Terms) -> Any:
    if grammar.reasoning is not None and not terms.knows_reasoning:
        raise BadRequest(
            "this model thinks first, and its engine does not know where a thought ends: set reasoning_parser in "
            "the engine options to hold answers to a grammar",
            param="response_format",
        )
    return terms.api.guided(**{grammar.kind: grammar.text})
