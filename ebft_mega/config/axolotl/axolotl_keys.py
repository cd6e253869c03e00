"""What becomes of another trainer's key here: the one table that messages, `tools/import_axolotl.py` and docs use.

Names are those of axolotl's files, nested ones with dots and without numbers of list items; `*` stands for any text.
Which value comes out is computed in `axolotl_translation.py`; `make docs-tables` writes the table of `docs/axolotl.md`.
"""

import difflib
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase

SIMILAR = 0.7  # below it two names have letters in common, and no more
AXOLOTL = "axolotl"


class Fate(Enum):
    """What becomes of a key."""

    TAKEN = "taken over"
    TRANSLATED = "translated"
    REFUSED = "refused"
    MEANINGLESS = "without meaning here"


@dataclass(frozen=True)
class ForeignKey:
    """Keys of another trainer with one fate."""

    names: tuple[str, ...]
    fate: Fate
    ours: tuple[str, ...] = ()  # keys that hold it here; none where it changes no key
    words: str = ""  # how it is translated, or why it is refused or without meaning
    program: str = AXOLOTL

    @property
    def meaning(self) -> str:
        """What to write here instead, or why there is nothing, in one phrase."""
        if self.fate is Fate.TRANSLATED:
            return ": ".join(filter(None, (" and ".join(self.ours), self.words)))
        kind = "" if self.fate is Fate.REFUSED else f"{self.fate.value}: "
        return f"no such key: {kind}{self.words}"


def _translated(names: str, ours: str, words: str = "", program: str = AXOLOTL) -> ForeignKey:
    return ForeignKey(tuple(names.split()), Fate.TRANSLATED, tuple(ours.split()), words, program)


def _refused(names: str, words: str) -> ForeignKey:
    return ForeignKey(tuple(names.split()), Fate.REFUSED, (), words)


def _meaningless(names: str, words: str) -> ForeignKey:
    return ForeignKey(tuple(names.split()), Fate.MEANINGLESS, (), words)


_EBFT = (
    "mode stride context_length generate_max_len n_samples_per_prompt temperature top_p feature_layers embed_method "
    "use_whitening alignment_coef diversity_coef rl_coef ce_coef advantage_estimator "
    "feature_norm whitening alignment feature_model"
).split()
STRUCTURED = "belongs to axolotl's structured mode (prompt and completion); this trainer reads raw, unlabeled rows"
LORA = "LoRA is not yet supported here: all parameters are trained"
_DROPOUT = (
    "dropout is 0 here: a rollout must be scored by the network that sampled it, or its gradient is another one's"
)
_ROWS = "rows are always packed to their full length, from end to end"
_KERNELS = "kernels and compilation change no value; they are chosen here (train.attention is the one choice)"
_ONE_METHOD = "settings of other methods; this trainer has one, `rl: ebft` in strided mode"
_LOGS = "every step is logged, to metrics.jsonl, tensorboard/ and the report page, and nothing is sent anywhere"
_TOKENIZER = "the tokenizer is that of the model's directory, as it is; build_shards.py uses it"

AXOLOTL_KEYS = (
    ForeignKey(("seed",), Fate.TAKEN, ("seed",)),
    ForeignKey(("output_dir",), Fate.TAKEN, ("output_dir",), "relative paths start at the repository root"),
    ForeignKey(
        tuple(f"ebft.{name}" for name in _EBFT),
        Fate.TAKEN,
        ("ebft.*",),
        "feature_norm: per_layer and whitening: feature are written beside them, for they are what axolotl does; "
        "embed_method concat and completion_mean become last_token, which its strided mode takes then",
    ),
    _translated("base_model", "model.init_from", "a local directory: download the model and name it"),
    _translated(
        "datasets pretraining_dataset",
        "data.shards",
        "download the text and build shards of it with tools/build_shards.py",
    ),
    _translated("datasets.path datasets.split datasets.name datasets.data_files datasets.revision", "data.shards"),
    _translated("datasets.text_column datasets.field", "data.shards", "--text-key of tools/build_shards.py"),
    _translated("datasets.type datasets.ds_type", "data.shards", "tools/build_shards.py reads text of every kind"),
    _translated("test_datasets test_datasets.*", "evaluation.shards", "build shards of it with tools/build_shards.py"),
    _translated(
        "val_set_size", "evaluation.shards", "the share that tools/build_shards.py --held-out sets aside, by documents"
    ),
    _translated("sequence_len", "data.sequence_length"),
    _translated("sample_packing", "data.document_masking", f"true, for documents do not see each other there; {_ROWS}"),
    _translated(
        "micro_batch_size", "train.micro_batch_size train.global_batch_size", "rows that a replica has at once"
    ),
    _translated(
        "gradient_accumulation_steps",
        "train.global_batch_size",
        "micro_batch_size x gradient_accumulation_steps x GPUs",
    ),
    _translated("batch_size", "train.global_batch_size", "batch_size x GPUs"),
    _translated("max_steps", "train.max_steps"),
    _translated("num_epochs", "train.max_steps", "epochs of --data-tokens, where there is no max_steps"),
    _translated("learning_rate", "train.lr"),
    _translated("lr_scheduler", "train.lr_scheduler", "constant_with_warmup is constant"),
    _translated("cosine_min_lr_ratio", "train.min_lr", "cosine_min_lr_ratio x learning_rate, with the cosine schedule"),
    _translated("warmup_ratio", "train.warmup_steps", "warmup_ratio x train.max_steps, rounded up"),
    _translated("warmup_steps", "train.warmup_steps"),
    _translated("weight_decay", "train.weight_decay"),
    _translated("adam_beta1 adam_beta2", "train.betas", "0.9 and 0.999 where they are not given, as there"),
    _translated("max_grad_norm", "train.grad_clip"),
    _translated("optimizer", "train.optimizer", "adamw, with float32 states, for all that begin so"),
    _translated("bf16 bfloat16", "train.dtype", "bfloat16; float32 where it is false"),
    _translated("float32", "train.dtype"),
    _translated("gradient_checkpointing", "train.activation_checkpointing", "true is full, false is none"),
    _translated("flex_attention attn_implementation", "train.attention", "auto, which is flex attention on CUDA"),
    _translated(
        "flash_attention sdp_attention xformers_attention sage_attention eager_attention", "train.attention", "auto"
    ),
    _translated("tensor_parallel_size", "parallel.tensor_parallel_size"),
    _translated("deepspeed", "zero.stage", "the stage of its name; the file is not read"),
    _translated("fsdp fsdp_config fsdp_version", "zero.stage", "3, which divides the same things"),
    _translated("save_steps", "checkpoint.interval", "below 1 a share of train.max_steps"),
    _translated("save_total_limit", "checkpoint.keep_last"),
    _translated("eval_steps", "evaluation.interval", "below 1 a share of train.max_steps"),
    _translated("resume_from_checkpoint", "checkpoint.resume", "a checkpoint of this trainer, or of a run"),
    _translated("auto_resume_from_checkpoints", "checkpoint.resume", "true is auto, false is never"),
    _translated("profiler_steps profiler_steps_start", "profile.steps profile.start"),
    _translated("dataloader_num_workers", "data.workers"),
    _translated("rl", "", "`ebft` is the only method here"),
    _refused("ebft.min_completion_prefix ebft.adaptive_max_tokens ebft.gt_length_multiplier", STRUCTURED),
    _refused("*dropout* overrides_of_model_config.*dropout*", _DROPOUT),
    _refused("adapter lora_* peft* qlora* relora* jagged_* loraplus_* load_in_8bit load_in_4bit merge_lora", LORA),
    _refused("bnb_* gptq* quantize_moe_experts", LORA),
    _refused(
        "context_parallel_size sequence_parallel_degree ring_attn_func heads_k_stride",
        "context parallelism is not part of this trainer: a row and its rollouts stay in one replica",
    ),
    _refused(
        "train_on_inputs roles_to_train train_on_eos",
        "question/answer masks are not part of this trainer: every token of the raw text counts",
    ),
    _refused("fp16 float16 fp8 fp8_*", "train.dtype is bfloat16 or float32"),
    _refused("adam_epsilon adam_epsilon2 adam_beta3 optim_args optim_target_modules", "AdamW's epsilon is 1e-8"),
    _refused("lr_scheduler_kwargs cosine_constant_lr_ratio", "train.min_lr is all that a schedule here is given"),
    _refused(
        "learning_rate_* lr_groups embedding_lr embedding_lr_scale lr_quadratic_warmup", "one rate for all weights"
    ),
    _refused("saves_per_epoch", "write checkpoint.interval, in steps: a run here is counted in steps"),
    _refused("evals_per_epoch", "write evaluation.interval, in steps: a run here is counted in steps"),
    _refused("early_stopping_patience load_best_model_at_end", "a run ends after its last step; every model is kept"),
    _refused("unfrozen_parameters lisa_* spectrum*", "all parameters are trained"),
    _refused("neftune_noise_alpha noisy_embedding_alpha", "noise in the embeddings would change what is scored"),
    _refused(
        "trust_remote_code model_revision revision_of_model", "code of a model is never run; a model is its files"
    ),
    _refused("overrides_of_model_* model_config* base_model_config rope_scaling", "change the model's own config.json"),
    _refused("reinit_weights", "name the architecture in model.config for random weights"),
    _refused(
        "use_pose pose_* s2_attention scaling_softmax*", "another model or attention than the one that is trained"
    ),
    _refused("trainer_cls", "there is one trainer, and no code of others is loaded"),
    _meaningless("ebft rl_beta", "the section, or a setting of other methods"),
    _meaningless("trl trl.* vllm vllm.* *dpo_* *kto_* orpo_* simpo_* cpo_* rl_*", _ONE_METHOD),
    _meaningless("reward_model process_reward_model center_rewards_coefficient num_labels", _ONE_METHOD),
    _meaningless("precompute_ref_log_probs use_eaft eaft_* max_prompt_len", _ONE_METHOD),
    _meaningless("wandb_* use_wandb mlflow_* use_mlflow comet_* use_comet trackio_* use_trackio swanlab_*", _LOGS),
    _meaningless("otel_* use_otel* use_tensorboard logging_steps include_tokens_per_second include_tkps", _LOGS),
    _meaningless("*hub_* hf_use_auth_token push_dataset_to_hub", "nothing is downloaded or uploaded"),
    _meaningless(
        "dataset_* datasets.* shuffle_* skip_prepare_dataset num_dataset_shards_to_save streaming*",
        ("shards are built once, by tools/build_shards.py; documents are shuffled by data order and seed"),
    ),
    _meaningless("pretrain_multipack_* pretraining_sample_concatenation sample_packing_* eval_sample_packing", _ROWS),
    _meaningless(
        "pad_to_sequence_len pad_to_multiple_of multipack_real_batches batch_flattening group_by_length", _ROWS
    ),
    _meaningless("excess_length_strategy min_sample_len curriculum_sampling eval_sequence_len", _ROWS),
    _meaningless("remove_unused_columns dataloader_* accelerator_config", "data is read by processes of its own"),
    _meaningless(
        "eval_batch_size eval_table_* do_*_eval do_bench_eval bench_* eval_causal_lm_metrics",
        ("an evaluation reads evaluation.rows held-out rows and measures eval/*"),
    ),
    _meaningless(
        "metric_for_best_model greater_is_better eval_strategy evaluation_strategy save_strategy",
        ("evaluation.interval and checkpoint.interval say when"),
    ),
    _meaningless(
        "save_safetensors save_only_model save_first_step save_on_* dynamic_checkpoint*",
        ("checkpoints are safetensors, with everything that a resume needs; SIGUSR1 or a file SAVE asks for one"),
    ),
    _meaningless("special_tokens special_tokens.* tokens added_tokens_overrides tokenizer_* tokens.*", _TOKENIZER),
    _meaningless("chat_template* eot_tokens default_system_message resize_token_embeddings_to_32x", _TOKENIZER),
    _meaningless("mean_resizing_embeddings shrink_embeddings embeddings_skip_upcast", _TOKENIZER),
    _meaningless("model_type type_of_model is_*_derived_model is_falcon_derived_model", "config.json says it"),
    _meaningless("torch_compile* plugins liger_* cut_cross_entropy unsloth_* chunked_cross_entropy*", _KERNELS),
    _meaningless("flash_attn_* flash_optimum flex_attn_* tiled_mlp* deepcompile use_kernels *_kernel", _KERNELS),
    _meaningless(
        "gradient_checkpointing_kwargs activation_offloading layer_offloading experts_implementation", _KERNELS
    ),
    _meaningless(
        "tf32 gc_steps low_cpu_mem_usage max_memory gpu_memory_limit device device_map",
        ("memory is planned: --dry-run prints the plan"),
    ),
    _meaningless(
        "world_size local_rank ddp ddp_* dp_shard_size dp_replicate_size use_ray ray_*",
        ("the launcher says how many processes there are; what tensor and pipeline parallelism leave are replicas"),
    ),
    _meaningless("fsdp_final_state_dict_type", "a checkpoint is resumed by any layout"),
    _meaningless(
        "loss_watchdog_*", "a step that is not finite is skipped; train.step_timeout_minutes ends a hanging run"
    ),
    _meaningless(
        "debug strict seed_* gradio_* axolotl_config_path *multimodal* processor_* freeze_mm_modules",
        ("it concerns the program, and not the run"),
    ),
)
# What other trainers call the same thing.
OTHER_KEYS = (
    _translated("alignment_rew_coef", "ebft.alignment_coef", program="the EBFT authors' code"),
    _translated("diversity_rew_coef", "ebft.diversity_coef", program="the EBFT authors' code"),
    _translated("ce_loss_coef", "ebft.ce_coef", program="the EBFT authors' code"),
    _translated("rl_loss_coef", "ebft.rl_coef", program="the EBFT authors' code"),
    _translated("adam_betas", "train.betas", program="the EBFT authors' code"),
    _translated("seq_length", "data.sequence_length", program="Megatron"),
    _translated("max_seq_length", "data.sequence_length", program="Hugging Face's trainers"),
    _translated("train_batch_size", "train.global_batch_size", program="DeepSpeed"),
    _translated("gradient_clipping", "train.grad_clip", program="DeepSpeed"),
)


def foreign_key(name: str) -> ForeignKey | None:
    """Find what becomes of a key of another trainer; None if nobody here knows it.

    Args:
        name: dotted, as the table has it.
    """
    table = (*AXOLOTL_KEYS, *OTHER_KEYS)
    exact = (key for key in table if name in key.names)
    matching = (key for key in table if any("*" in pattern and fnmatchcase(name, pattern) for pattern in key.names))
    return next(exact, None) or next(matching, None)


def our_name(leaf: str) -> str:
    """The one key that holds here what another trainer's key of this name holds; empty if there is none."""
    found = foreign_key(leaf)
    return found.ours[0] if found is not None and found.fate is Fate.TRANSLATED and found.ours else ""


def nearest_foreign(name: str) -> str:
    """The known key of axolotl that a wrong one may mean; empty if none is near."""
    known = [each for key in AXOLOTL_KEYS for each in key.names if "*" not in each]
    near = difflib.get_close_matches(name, known, n=1, cutoff=SIMILAR)
    return near[0] if near else ""
