//! Burn layers over 4-bit weights: Linear4bit, LoRA adapters and their hand-written backward passes
