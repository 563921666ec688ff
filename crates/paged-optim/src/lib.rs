//! AdamW for Burn tensors with state that can be saved bit for bit
