//! Decoder-only language models built from config.json, loaded straight into 4 bits
