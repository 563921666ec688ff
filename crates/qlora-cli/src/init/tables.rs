//! What keys of other trainers are called here.

/// How a value becomes one of ours.
#[derive(Clone, Copy, Debug)]
pub enum How {
    /// As it is.
    Same,
    /// A number with a point, where a whole one stands for it.
    Float,
    /// `true` becomes the first value and `false` the second one, in TOML; an empty one is what stands there anyway.
    Bool(&'static str, &'static str),
    /// A word becomes another one; the value is in TOML, and an empty one is what stands there anyway.
    Words(&'static [(&'static str, &'static str)]),
    /// It has no meaning here, for this reason.
    Nothing(&'static str),
}

use How::{Bool, Float, Nothing, Same, Words};

/// A key of another trainer, ours (empty for none), and how its value becomes ours.
pub type Row = (&'static str, &'static str, How);

const OPTIMIZERS: How = Words(&[
    ("adamw_torch", "\"adamw_32bit\""),
    ("adamw_torch_fused", "\"adamw_32bit\""),
    ("adamw_hf", "\"adamw_32bit\""),
    ("adamw_apex_fused", "\"adamw_32bit\""),
    ("paged_adamw_32bit", "\"adamw_32bit\""),
    ("paged_adamw", "\"adamw_32bit\""),
    ("adamw_bnb_8bit", "\"adamw_8bit\""),
    ("adamw_8bit", "\"adamw_8bit\""),
    ("paged_adamw_8bit", "\"adamw_8bit\""),
    ("lion_8bit", "\"lion_8bit\""),
    ("paged_lion_8bit", "\"lion_8bit\""),
]);

const SCHEDULES: How = Words(&[
    ("constant", "\"constant\""),
    ("constant_with_warmup", "\"constant\""),
    ("linear", "\"linear\""),
    ("cosine", "\"cosine\""),
]);

const ATTENTION: How = Nothing("attention is always computed block by block");
const WORKERS: How = Nothing("rows are tokenized on all cores before the run");
const CHECKPOINTING: How = Bool("", "\"none\"");

/// What HF's `TrainingArguments` and both trainers over it have.
pub const SHARED: &[Row] = &[
    ("output_dir", "train.output_dir", Same),
    ("max_steps", "train.max_steps", Same),
    ("gradient_accumulation_steps", "train.gradient_accumulation_steps", Same),
    ("learning_rate", "train.learning_rate", Float),
    ("warmup_steps", "train.warmup_steps", Same),
    ("warmup_ratio", "train.warmup_ratio", Float),
    ("weight_decay", "train.weight_decay", Float),
    ("adam_epsilon", "train.eps", Float),
    ("max_grad_norm", "train.max_grad_norm", Float),
    ("seed", "train.seed", Same),
    ("save_steps", "train.save_every", Same),
    ("save_total_limit", "train.save_limit", Same),
    ("eval_steps", "train.eval_every", Same),
    ("logging_steps", "train.log_every", Same),
    ("early_stopping_patience", "train.early_stopping_patience", Same),
    ("neftune_noise_alpha", "train.neftune_alpha", Float),
    ("loraplus_lr_ratio", "train.lora_plus_ratio", Float),
    ("gradient_checkpointing", "train.activation_checkpointing", CHECKPOINTING),
    ("gradient_checkpointing_kwargs", "", Nothing("activations are kept or computed again as memory allows")),
    ("group_by_length", "data.group_by_length", Same),
    ("bf16", "quantization.compute_dtype", Words(&[("true", "\"bf16\""), ("auto", ""), ("full", "\"bf16\"")])),
    ("fp16", "quantization.compute_dtype", Bool("\"f16\"", "")),
    ("tf32", "", Nothing("products are computed in the compute dtype")),
    ("flash_attention", "", ATTENTION),
    ("flash_attn", "", ATTENTION),
    ("sdp_attention", "", ATTENTION),
    ("xformers_attention", "", ATTENTION),
    ("attn_implementation", "", ATTENTION),
    ("dataloader_num_workers", "", WORKERS),
    ("dataloader_prefetch_factor", "", WORKERS),
    ("dataset_processes", "", WORKERS),
    ("preprocessing_num_workers", "", WORKERS),
    ("dataset_prepared_path", "", Nothing("data.cache names the folder of tokenized rows")),
    ("overwrite_cache", "", Nothing("tokenized rows are found again only where nothing has changed")),
    ("overwrite_output_dir", "", Nothing("`qlora train --overwrite` does that")),
    ("resume_from_checkpoint", "", Nothing("`qlora train --resume` does that")),
    ("auto_resume_from_checkpoints", "", Nothing("`qlora train --resume auto-or-start` does that")),
    ("trust_remote_code", "", Nothing("no code of a checkpoint is run")),
    ("trust_remote", "", Nothing("no code of a checkpoint is run")),
    ("low_cpu_mem_usage", "", Nothing("weights are quantized while they are read")),
    ("local_rank", "", Nothing("`qlora train --gpus N` or a launcher says it")),
    ("ddp_timeout", "", Nothing("`qlora train --gpus N` or a launcher starts the ranks")),
];

/// Axolotl's (docs.axolotl.ai/docs/config-reference.html).
pub const AXOLOTL: &[Row] = &[
    ("base_model", "model.path", Same),
    ("revision_of_model", "model.revision", Same),
    ("model_type", "", Nothing("config.json says it")),
    ("tokenizer_type", "", Nothing("tokenizer.json says it")),
    ("lora_r", "lora.rank", Same),
    ("lora_alpha", "lora.alpha", Float),
    ("lora_dropout", "lora.dropout", Float),
    ("lora_target_modules", "lora.target_modules", Same),
    ("lora_target_linear", "lora.target_modules", Bool("\"all-linear\"", "")),
    ("lora_modules_to_save", "lora.modules_to_save", Same),
    ("peft_layers_to_transform", "lora.layers_to_transform", Same),
    ("peft_use_dora", "lora.use_dora", Same),
    ("peft_use_rslora", "lora.use_rslora", Same),
    ("peft_layers_pattern", "lora.layers_pattern", Same),
    ("lora_mlp_kernel", "", Nothing("kernels are chosen by the device")),
    ("lora_qkv_kernel", "", Nothing("kernels are chosen by the device")),
    ("lora_o_kernel", "", Nothing("kernels are chosen by the device")),
    ("sequence_len", "data.max_length", Same),
    ("train_on_inputs", "data.loss_on", Bool("\"all\"", "")),
    ("default_system_message", "data.system_prompt", Same),
    ("micro_batch_size", "train.batch_size", Same),
    ("num_epochs", "train.epochs", Float),
    ("lr_scheduler", "train.schedule", SCHEDULES),
    ("cosine_min_lr_ratio", "train.min_learning_rate_ratio", Float),
    ("loraplus_lr_embedding", "train.embedding_learning_rate", Float),
    ("embedding_lr", "train.embedding_learning_rate", Float),
    ("use_tensorboard", "train.log_to", Bool("[\"tensorboard\"]", "")),
    ("optimizer", "train.optimizer", OPTIMIZERS),
    ("shuffle_merged_datasets", "data.shuffle", Same),
    ("resize_token_embeddings_to_32x", "", Nothing("model.resize_embeddings adds rows for new tokens alone")),
];

/// LLaMA-Factory's.
pub const FACTORY: &[Row] = &[
    ("model_name_or_path", "model.path", Same),
    ("model_revision", "model.revision", Same),
    ("do_train", "", Nothing("`qlora train` does that")),
    ("lora_rank", "lora.rank", Same),
    ("lora_alpha", "lora.alpha", Float),
    ("lora_dropout", "lora.dropout", Float),
    ("use_rslora", "lora.use_rslora", Same),
    ("use_dora", "lora.use_dora", Same),
    ("cutoff_len", "data.max_length", Same),
    ("val_size", "data.eval_fraction", Float),
    ("train_on_prompt", "data.loss_on", Bool("\"all\"", "")),
    ("default_system", "data.system_prompt", Same),
    ("per_device_train_batch_size", "train.batch_size", Same),
    ("num_train_epochs", "train.epochs", Float),
    ("lr_scheduler_type", "train.schedule", SCHEDULES),
    ("optim", "train.optimizer", OPTIMIZERS),
    ("plot_loss", "", Nothing("loss.svg is always drawn")),
];

/// PEFT's `adapter_config.json`.
pub const PEFT: &[Row] = &[
    ("base_model_name_or_path", "model.path", Same),
    ("revision", "model.revision", Same),
    ("r", "lora.rank", Same),
    ("lora_alpha", "lora.alpha", Float),
    ("lora_dropout", "lora.dropout", Float),
    ("target_modules", "lora.target_modules", Same),
    ("exclude_modules", "lora.exclude_modules", Same),
    ("layers_to_transform", "lora.layers_to_transform", Same),
    ("layers_pattern", "lora.layers_pattern", Same),
    ("use_rslora", "lora.use_rslora", Same),
    ("use_dora", "lora.use_dora", Same),
    ("lora_bias", "lora.lora_bias", Same),
    ("modules_to_save", "lora.modules_to_save", Same),
    ("rank_pattern", "lora.rank_pattern", Same),
    ("alpha_pattern", "lora.alpha_pattern", Same),
    ("trainable_token_indices", "lora.trainable_token_indices", Same),
    (
        "init_lora_weights",
        "lora.init",
        Words(&[
            ("true", ""),
            ("gaussian", "\"gaussian\""),
            ("pissa", "\"pissa\""),
            ("olora", "\"olora\""),
            ("loftq", "\"loftq\""),
            ("eva", "\"eva\""),
        ]),
    ),
    ("bias", "", Words(&[("none", "")])),
    ("peft_type", "", Words(&[("LORA", "")])),
    ("task_type", "", Words(&[("CAUSAL_LM", "")])),
    ("inference_mode", "", Nothing("an adapter is trained")),
    ("peft_version", "", Nothing("it decides on nothing")),
    ("auto_mapping", "", Nothing("it decides on nothing")),
];
