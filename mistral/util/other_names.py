"""What flags, fields and commands of this library are called in other programs: transformers, vLLM, llama.cpp, Ollama,
torchtune, OpenAI's clients. For messages alone: none of these names is accepted. Runs without torch."""

from __future__ import annotations

# By the name here: where the place that is asked has none of that name, its other names mean something else.
_THEIRS = {
    "lr": "learning_rate",
    "max_tokens": "max_new_tokens n_predict num_predict max_length max_gen_len max_completion_tokens predict",
    "temperature": "temp",
    "repetition_penalty": "repeat_penalty rep_pen",
    "n": "num_return_sequences best_of num_samples limit",
    "stop": "stop_sequences stop_strings reverse_prompt stop_token",
    "top_logprobs": "logprobs prompt_logprobs n_probs",
    "folder": "model model_path model_name_or_path model_name model_id ckpt_dir checkpoint_dir base_model hf_repo m",
    "model": "model_path model_name_or_path model_name model_id",
    "src": "model model_path input in_path infile",
    "dst": "output_dir output out outfile out_path save_path",
    "out": "output_dir output save_path",
    "output": "output_dir out outfile output_file output_path save_path",
    "data": "dataset dataset_name data_path train_data train_file training_data",
    "eval_data": "validation_file eval_file valid_data test_data",
    "epochs": "num_train_epochs num_epochs n_epochs",
    "steps": "max_steps num_steps iters total_steps",
    "batch_size": "per_device_train_batch_size train_batch_size micro_batch_size per_device_batch_size",
    "accumulate": "gradient_accumulation_steps grad_accumulation_steps accumulation_steps num_microbatches",
    "warmup": "warmup_steps warmup_ratio",
    "clip": "max_grad_norm max_norm grad_clip",
    "lora": "lora_r lora_rank rank r",
    "lora_targets": "lora_target_modules target_modules lora_target",
    "eval_every": "eval_steps eval_freq eval_iters",
    "save_every": "save_steps ckpt_freq save_freq",
    "recompute": "gradient_checkpointing",
    "seq_len": "max_seq_length max_seq_len block_size cutoff_len ctx_size context_length max_length",
    "max_positions": "ctx_size n_ctx num_ctx max_model_len max_seq_len context_length c",
    "max_model_len": "ctx_size n_ctx max_positions max_seq_len context_length",
    "rows": "max_num_seqs max_batch_size batch_size np",
    "max_batch_size": "batch_size max_num_seqs",
    "chunk_size": "max_num_batched_tokens chunked_prefill_size ubatch_size prefill_chunk_size",
    "name": "served_model_name alias",
    "cors": "allowed_origins allow_origins",
    "threads": "num_threads n_threads nthreads",
    "parallel": "tensor_parallel_size tp tp_size nproc_per_node split",
    "gpus": "tensor_parallel_size num_gpus gpu_count",
    "dtype": "torch_dtype outtype precision",
    "to": "out_type format",
    "cache_dtype": "kv_cache_dtype cache_type_k cache_type_v ctk ctv cache_type",
    "quant": "quantization quantize load_in_8bit load_in_4bit q_mode",
    "attention": "attn_implementation attention_backend attn",
    "device": "device_map",
    "draft": "draft_model speculative_model model_draft speculative_config",
    "adapter": "lora lora_path lora_modules adapter_path peft_model lora_adapter",
    "system": "system_prompt sys",
    "template": "chat_template chat_template_file",
    "instruct": "chat conversation cnv apply_chat_template chat_mode",
    "file": "prompts prompt_file input_file input text_file",
    "input": "input_file",
    "task": "tasks",
    "key_env": "api_key",
    "concurrency": "max_concurrency num_concurrent",
    # commands
    "complete": "generate run completion predict",
    "interactive": "chat cli",
    "finetune": "train sft tune",
    "bench": "benchmark",
    "serve": "server api",
    "inspect": "info show",
    "eval": "evaluate",
    "deploy": "export",
    # commands in a conversation
    "quit": "exit bye q",
    "reset": "clear new",
    "retry": "regenerate regen redo",
}
_HERE: dict[str, list[str]] = {}
for _ours, _names in _THEIRS.items():
    for _name in _names.split():
        _HERE.setdefault(_name, []).append(_ours)


def is_elsewhere(name: str) -> bool:
    """Whether it is a name of another program: what is most like it here is then something else."""
    return name.replace("-", "_").lower() in _HERE


def called_here(name: str, known: list[str]) -> str | None:
    """What a name of another program is called, of the names that are known where it was typed; None: nothing."""
    return next((ours for ours in _HERE.get(name.replace("-", "_").lower(), ()) if ours in known), None)
