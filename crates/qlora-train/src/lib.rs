//! Fine-tuning: data pipeline, loss, training loop, checkpoints and reports
