//! Checkpoint and adapter formats: safetensors shards, bitsandbytes 4-bit weights, PEFT adapters
