"""Options and commands of other programs, and what Veneer calls them.

One table answers unknown YAML keys, flags and commands. It covers Axolotl, LLaMA-Factory, mlx-lm, TRL, Unsloth, PEFT,
transformers' ``TrainingArguments`` and OpenAI's fine-tuning API. An entry is

    a name        the option here, which is suggested where the command has it
    a sentence    there is no such option: it is always on, not needed or not supported
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

_ALWAYS = "always on"
_NO_BATCHES = "not needed: batch_size counts the examples of an optimizer step, and tokens_per_pass bounds memory"
_QUANTIZE = "not an option: choose the format of the base with quantize: nf4, fp4 or int8"
_NO_HUB = "not an option: upload the adapter when the run has ended, with veneer push RUN OWNER/NAME"
_PRECISION = "not an option: choose the data type of the base with dtype (adapters train in float32)"
_NO_CODE = "not supported: Veneer runs no code from model repositories"
_DECODING = "not supported: sampling has temperature and top_p"

_TABLE: Mapping[str, str] = {
    # base
    "model model_name model_name_or_path pretrained_model_name_or_path model_id model_path base_model hf_path": "base",
    "base_model_name_or_path tokenizer tokenizer_name model_type": "base",
    "model_revision revision_of_model": "revision",
    "torch_dtype precision compute_dtype": "dtype",
    "bf16 fp16 tf32 half pure_bf16 bfloat16 float16": _PRECISION,
    "load_in_4bit load_in_8bit quantization_bit quantization_method quantization bnb_4bit_quant_type q_bits gptq qlora": _QUANTIZE,
    "trust_remote_code": _NO_CODE,
    "flash_attention flash_attn attn_implementation flash_attn_2 sdp_attention xformers_attention": _ALWAYS
    + ": attention runs per example, without padding",
    "use_liger_kernel liger_kernel enable_liger_kernel use_unsloth unsloth_lora_mlp": _ALWAYS + ": see compile",
    "device_map cuda gpu gpus n_gpu no_cuda use_cpu": "device",
    "num_processes nproc_per_node ddp world_size": "processes",
    "sequence_parallel_size context_parallel_size ulysses_degree sp_size cp_size context_parallel_degree": "sequence_parallel",
    "ddp_timeout": "answer_minutes",
    "ray ray_address ray_cluster num_nodes nnodes num_machines": "cluster",
    "deepspeed fsdp fsdp_config fsdp_sharding_strategy zero_stage": "shard",
    "num_threads n_threads omp_num_threads": "threads",
    # data
    "dataset datasets dataset_name dataset_path dataset_dir data_path train_file train_data training_file file files train": "data",
    "train_dataset train_jsonl jsonl input_file": "data",
    "validation validation_file valid_file val_file test_datasets eval_dataset eval_data val_dataset": "valid",
    "val_set_size val_size validation_split validation_fraction test_size eval_split val_fraction": "valid_fraction",
    "sequence_len cutoff_len max_seq_length max_seq_len max_sequence_length model_max_length block_size context_length": "max_length",
    "max_source_length max_target_length max_prompt_length seq_len": "max_length",
    "packing sample_packing pad_to_sequence_len neat_packing padding_free group_by_length": _ALWAYS
    + ": examples share a pass without padding and never see each other",
    "mask_prompt train_on_inputs train_on_prompt train_on_responses_only completion_only_loss assistant_only_loss": "train_on",
    "mask_history roles_to_train train_on_eos": "train_on",
    "template chat_template_jinja prompt_template prompt_style": "chat_template",
    "dataset_text_field prompt_feature completion_feature chat_feature text_feature field_messages": "columns",
    "dataset_format dataset_type type": "format",
    "dataloader_num_workers dataset_num_proc preprocessing_num_workers num_proc num_workers": "not needed: examples are "
    "prepared once, before the first step",
    "shuffle shuffle_seed data_seed": "seed",
    "max_samples max_train_samples limit_train": "not supported: cut the file of examples instead",
    # adapter
    "lora_r lora_rank rank lora_dim": "r",
    "alpha lora_scale scale": "lora_alpha",
    "dropout lora_drop": "lora_dropout",
    "lora_target lora_target_modules lora_target_linear keys lora_modules target_layers": "target_modules",
    "num_layers lora_layers layers": "layers_to_transform",
    "lora_modules_to_save additional_target additional_trainable_modules": "modules_to_save",
    "adapter peft_type finetuning_type fine_tune_type train_type use_dora peft_use_dora use_peft use_lora lora": "method",
    "rslora peft_use_rslora": "use_rslora",
    "loraplus_ratio loraplus_lr_embedding lora_plus": "loraplus_lr_ratio",
    "lora_model_dir adapter_name_or_path resume_adapter_file init_from_adapter adapter_model start_from network_weights": "init_from",
    # tasks
    "rl rlhf training_task": "task",
    "dpo_beta rl_beta pref_beta orpo_alpha orpo_beta kto_beta": "beta",
    "kto_desirable_weight kto_chosen_weight": "desirable_weight",
    "kto_undesirable_weight kto_rejected_weight": "undesirable_weight",
    "loss_type pref_loss dpo_loss dpo_loss_type": "preference_loss",
    "dpo_label_smoothing cdpo_label_smoothing": "label_smoothing",
    "ref_model reference_free precompute_ref_log_probs ref_adapter_name model_adapter_name": "not needed: the reference is the base "
    "without the adapter, so no second model is loaded",
    # steps
    "max_steps iters iterations total_steps num_steps": "steps",
    "n_epochs num_epochs num_train_epochs max_epochs epoch": "epochs",
    "lr learning_rate_multiplier max_learning_rate": "learning_rate",
    "lr_scheduler lr_scheduler_type lr_schedule scheduler_type": "schedule",
    "warmup warmup_ratio num_warmup_steps warmup_iters": "warmup_steps",
    "optim optimizer_name optimizer_type": "optimizer",
    "adam_beta1 adam_beta2 beta1 beta2": "betas",
    "adam_epsilon epsilon adam_eps": "eps",
    "max_grad_norm gradient_clipping grad_clip clip_grad clip_grad_norm gradient_clip_val": "clip",
    "per_device_train_batch_size train_batch_size global_batch_size": "batch_size",
    "micro_batch_size gradient_accumulation_steps grad_accumulation_steps per_device_eval_batch_size eval_batch_size "
    "accumulate_grad_batches auto_find_batch_size": _NO_BATCHES,
    "gradient_checkpointing grad_checkpoint use_gradient_checkpointing activation_offloading": "activation_checkpointing",
    "neftune_noise_alpha label_smoothing_factor": "not supported",
    # run
    "output output_dir out_dir save_path save_dir adapter_path": "out",
    "eval_steps steps_per_eval eval_interval val_every evals_per_epoch eval_strategy evaluation_strategy": "eval_every",
    "eval_table_size num_eval_samples sample_every": "samples",
    "eval_prompts": "sample_prompts",
    "save_steps save_interval saves_per_epoch save_strategy checkpoint_every": "save_every",
    "logging_steps steps_per_report log_every log_interval logging_strategy plot_loss logging_dir": _ALWAYS
    + ": every step is written to metrics/ in the run folder",
    "early_stopping_patience patience": "early_stop_patience",
    "load_best_model_at_end save_total_limit": _ALWAYS + ": the best adapter is in best/, the last one in adapter/",
    "report_to wandb wandb_project use_wandb tracker logger": "track",
    "resume resume_from_checkpoint auto_resume_from_checkpoints": "not needed: the same command resumes the run; "
    "resume-from names an older checkpoint",
    "overwrite_output_dir overwrite_cache": "fresh",
    "run_name suffix experiment_name adapter_name": "name",
    "push_to_hub hub_model_id hub_token upload_repo": _NO_HUB,
    "stage do_train do_eval do_sample": "not needed here; leave it out",
    "random_state random_seed": "seed",
    # other commands
    "max_new_tokens max_completion_tokens max_output_tokens max_gen_len num_predict": "max_tokens",
    "temp": "temperature",
    "top_k min_p repetition_penalty num_beams presence_penalty frequency_penalty": _DECODING,
    "prompt prompts message input": "not an option: give the prompt as an argument after the target",
    "prompt_file prompts_file": "file",
    "system_prompt": "system",
    "adapters lora_path lora_adapter lora_adapters enable_lora peft_model": "not an option: give the adapter folder as an argument",
    "model_out export_dir export_path": "out",
    "weights adapter_weights": "not an option: write the weights behind the adapters, a:0.7 b:0.3",
    "density_of_ties": "density",
    "combination_type merge_method": "op",
    "de_quantize dequantize export_gguf": "not an option: use veneer export --to gguf",
}
NAMES: dict[str, str] = {word: answer for words, answer in _TABLE.items() for word in words.split()}
"""Option of another program -> option here, or a sentence."""

COMMANDS: dict[str, str] = {
    word: answer
    for words, answer in {
        "fuse merge_lora export_model merge_and_unload": "merge",
        "sft dpo orpo kto finetune fine_tune fine_tuning fit lora dora resume": "train",
        "infer inference run ask complete sample": "generate",
        "eval test benchmark perplexity score lm_eval": "evaluate",
        "preprocess validate lint": "data check",
        "preview show_data tokenize": "data show",
        "mix blend combine add average": "compose",
        "convert gguf": "export",
        "info show describe view": "inspect",
        "ls list ps status jobs": "runs",
        "env check": "doctor",
        "estimate memory": "plan",
        "schema": "config schema",
        "cli repl talk": "chat",
        "awq dwq gptq quant": "quantize",
        "server api deploy webui webchat": "serve",
        "upload publish push_to_hub": "push",
        "version": "use veneer --version",
    }.items()
    for word in words.split()
}
"""Command of another program -> command here, or a sentence."""


def near_miss(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean X?" or another answer for an unknown option; empty if there is none.

    Args:
        word: the unknown option, as it was written.
        known: the options that exist; the answer spells them as they are given here.
    """
    known = list(known)
    spelling = {_key(name): name for name in known}
    answer = NAMES.get(_key(word), "")
    if " " in answer or answer.startswith("not "):
        return f"; {answer}"
    return f"; did you mean {spelling[answer]}?" if answer in spelling else similar(word, known)


def command_hint(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean X?" or another answer for an unknown command; empty if there is none."""
    known = list(known)
    answer = COMMANDS.get(_key(word), "")
    if answer in known:
        return f"; did you mean veneer {answer}?"
    return f"; {answer}" if answer else similar(word, known)


def similar(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean X?" for a word that is spelled like a known one; empty if there is none."""
    spelling = {_key(name): name for name in known}
    close = difflib.get_close_matches(_key(word), spelling, n=1, cutoff=0.6)
    return f"; did you mean {spelling[close[0]]}?" if close else ""


def _key(word: str) -> str:
    return word.lower().strip("-_").replace("-", "_")
