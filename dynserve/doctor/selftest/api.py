"""The names, keywords and options of the installed package, against those that the executor uses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import fields

from dynserve.doctor.selftest.fact import Row, judged
from dynserve.executors.option_names import ARGS
from dynserve.executors.trtllm import PIN
from dynserve.executors.trtllm.api import Api
from dynserve.executors.trtllm.arguments import release_of
from dynserve.executors.trtllm.options import schema_of

NEWER = {"trace_headers", "conversation_params", "priority"}  # keywords that version 1.2 lacks
KEYWORDS = {"streaming", "lora_request", "disaggregated_params", "scheduling_params", "cache_salt"}
SAMPLING = {
    "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "end_id", "pad_id", "stop_token_ids",
    "detokenize", "return_perf_metrics", "presence_penalty", "frequency_penalty", "repetition_penalty", "logprobs",
    "prompt_logprobs", "embedding_bias", "guided_decoding",
}  # fmt: skip
HANDED_OVER = {
    "request_type",
    "disagg_request_id",
    "ctx_request_id",
    "first_gen_tokens",
    "opaque_state",
    "draft_tokens",
}


SET_BY_US = {
    "skip_tokenizer_init", "tensor_parallel_size", "pipeline_parallel_size", "kv_cache_config", "cache_transceiver_config",
    "lora_config", "guided_decoding_backend", "enable_chunked_prefill", "enable_iter_perf_stats",
    "disable_overlap_scheduler", "telemetry_config",
}  # fmt: skip


def is_old(api: Api) -> bool:
    """Whether this version has the interface of 1.2."""
    return release_of(api.version) < (1, 3, 0, 0)


def api_rows(api: Api) -> Iterator[Row]:
    keywords = KEYWORDS if is_old(api) else KEYWORDS | NEWER
    yield judged("keywords of generate_async", "all there", _missing(keywords, api.keywords))
    yield judged("fields of SamplingParams", "all there", _missing(SAMPLING, [f.name for f in fields(api.sampling)]))
    yield judged("fields of DisaggregatedParams", "all there", _missing(HANDED_OVER, api.handed_over))
    yield judged("the class EngineDeadError", "no" if is_old(api) else "yes", "yes" if api.engine_dead else "no")
    schema = schema_of(api.arguments)
    set_by_us = SET_BY_US if not is_old(api) else SET_BY_US - {"telemetry_config"}
    yield judged("options that the worker sets", "all there", _missing(set_by_us, schema))
    for block, known in (("LLM", ARGS), *((name, nested) for name, nested in ARGS.items() if nested is not None)):
        theirs = schema.keys() - {"model", "backend"} if block == "LLM" else (schema.get(block) or {}).keys()
        yield judged(f"options of {block}", "", _compared(known, theirs))


def _missing(wanted: Iterable[str], found: Iterable[str]) -> str:
    missing = sorted(set(wanted) - set(found))
    return f"without {', '.join(missing)}" if missing else "all there"


def _compared(ours: Iterable[str], theirs: Iterable[str]) -> str:
    if not (theirs := set(theirs)):
        return "not listed by the package"
    more, fewer = sorted(theirs - set(ours)), sorted(set(ours) - theirs)
    found = [f"more: {', '.join(more)}"] if more else []
    found += [f"fewer: {', '.join(fewer)}"] if fewer else []
    return "; ".join(found) or f"those of {PIN}"
