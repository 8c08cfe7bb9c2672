"""The names of TensorRT-LLM's arguments at the pinned version, for machines where it is missing and for other executors.

A TensorRT-LLM worker uses the installed package's own models instead (`options.schema_of`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias, Union

Schema: TypeAlias = Mapping[str, Union["Schema", None]]  # None: a value, or a block whose keys are not checked


def _fields(text: str) -> dict[str, None]:
    return dict.fromkeys(text.split())


KV_CACHE: Schema = _fields("""
    enable_block_reuse enable_partial_reuse copy_on_partial_reuse tokens_per_block max_tokens free_gpu_memory_fraction
    max_gpu_total_bytes max_attention_window sink_token_length host_cache_size disk_cache_size disk_cache_path
    disk_prefetch_num_reqs secondary_offload_min_priority cross_kv_cache_fraction event_buffer_max_size
    attention_dp_events_gather_period_ms kv_events_config kv_cache_event_hash_algo dtype use_uvm iteration_stats_interval
    use_kv_cache_manager_v2 block_reuse_config mamba_ssm_cache_dtype mamba_ssm_stochastic_rounding mamba_ssm_philox_rounds
    mamba_state_config enable_swa_scratch_reuse max_util_for_resume enable_kv_pool_rebalance
    pool_ratio avg_seq_len fp8_context_mla_kv_len_cap
""")
TRANSCEIVER: Schema = _fields("""
    backend transceiver_runtime max_tokens_in_buffer kv_transfer_timeout_ms kv_transfer_sender_future_timeout_ms
    kv_transfer_poll_interval_ms kv_cache_bounce_size_mb enable_pipelined_transfer agent_bounce_buffer_enable
""")
ARGS: Schema = {
    **_fields("""
    tokenizer tokenizer_mode skip_tokenizer_init trust_remote_code tensor_parallel_size dtype revision tokenizer_revision
    pipeline_parallel_size context_parallel_size moe_tensor_parallel_size moe_expert_parallel_size moe_cluster_parallel_size
    enable_attention_dp enable_lm_head_tp_in_adp pp_partition cp_config gpus_per_node max_batch_size max_num_tokens
    max_input_len max_beam_width max_seq_len encoder_cuda_graph_config enable_chunked_prefill disable_overlap_scheduler
    guided_decoding_backend attn_backend moe_config speculative_config enable_lora load_format model_kwargs
    custom_tokenizer batched_logits_processor gather_generation_logits enable_iter_perf_stats enable_iter_req_stats
    print_iter_log max_stats_len iter_stats_max_iterations request_stats_max_iterations return_perf_metrics
    perf_metrics_max_requests perf_metrics_output_dir prometheus_metrics_config stream_interval num_postprocess_workers
    postprocess_tokenizer_dir post_processor_hook reasoning_parser batch_wait_timeout_ms batch_wait_timeout_iters
    batch_wait_max_tokens_ratio garbage_collection_gen0_threshold enable_autotuner torch_compile_config
    prefill_cuda_graph_backend allreduce_strategy sampler_force_async_worker enable_in_graph_sampling
    enable_low_latency_host_dispatch enable_tokenization_cache enable_early_first_token_response kv_connector_config
    orchestrator_type env_overrides telemetry_config generation_config sleep_config checkpoint_format checkpoint_io_policy
    mm_encoder_only disable_mm_encoder encode_only num_serve_frontends otlp_traces_endpoint checkpoint_loader dwdp_config
    enable_encoder_decoder_mixed_cuda_graph enable_energy_metrics enable_layerwise_nvtx_marker enable_min_latency
    enable_mla_skip_correction enable_resource_governor enable_return_routed_experts enable_speculative_beam_history_d2h
    encoder_max_batch_size encoder_max_num_tokens force_dynamic_quantization gms_config kv_cache_compression_config
    layer_wise_benchmarks_config mla_skip_correction_threshold multimodal_config mx_config nvfp4_gemm_config
    peft_cache_config prefill_capture_num_tokens ray_placement_config ray_worker_extension_cls ray_worker_nsight_options
    reorder_policy_config sparse_attention_config use_cute_dsl_bf16_bmm use_cute_dsl_bf16_gemm
    use_cute_dsl_blockscaling_bmm use_cute_dsl_blockscaling_mm use_fine_grained_sync
    """),
    "kv_cache_config": KV_CACHE,
    "cache_transceiver_config": TRANSCEIVER,
    # the last four for encoders only
    "cuda_graph_config": _fields("""
        batch_sizes max_batch_size enable_padding mode num_tokens max_num_token seq_lens max_seq_len
    """),
    "lora_config": _fields("""
        lora_dir lora_ckpt_source lora_target_modules trtllm_modules_to_hf_modules max_lora_rank max_loras max_cpu_loras
        swap_gate_up_proj_lora_b_weight cuda_graph_specialize_lora overlap_lora_and_base
    """),
    "scheduler_config": _fields("""
        capacity_scheduler_policy context_chunking_policy dynamic_batch_config waiting_queue_policy use_python_scheduler
        enable_prefix_aware_scheduling
    """),
    "attention_dp_config": _fields("""
        enable_balance timeout_iters batching_wait_iters enable_kv_cache_aware_routing kv_cache_routing_load_balance_weight
        kv_cache_routing_match_rate_threshold kv_cache_routing_fair_share_multiplier kv_cache_routing_cold_start_warmup
        kv_cache_routing_account_for_in_transfer kv_cache_routing_conversation_affinity kv_cache_routing_max_sessions
        kv_cache_routing_new_conv_placement
    """),
}
# accepted, and translated or dropped by `spellings`
OLD = frozenset(
    [
        "backend", "build_config", "pytorch_backend_config", "sampler_type", "hf_revision", "use_cuda_graph",
        "enable_chunked_context", "enable_trt_overlap", "enable_overlap_scheduler", "autotuner_enabled",
        "use_torch_sampler", "enable_trtllm_sampler", "mixed_sampler", "enable_mixed_sampler", "kv_cache_dtype",
        "moe_backend", "cuda_graph_batch_sizes", "cuda_graph_max_batch_size", "cuda_graph_padding_enabled",
    ]
)  # fmt: skip
