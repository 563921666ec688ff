//! Compares this workspace with recorded outputs of PEFT, bitsandbytes and transformers
fn main() {}
