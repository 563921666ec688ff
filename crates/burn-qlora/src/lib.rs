//! QLoRA fine-tuning on Burn: the facade over the workspace's crates
