//! The gated delta rule (Yang et al., 2024, arXiv 2412.06464, equation 10): linear attention whose state of each head, a matrix
//! `[key_dim, value_dim]`, forgets at a learned rate and is corrected by what it gets wrong.
//!
//! ```text
//! S ← exp(g) S      u = beta (v − Sᵀ k)      S ← S + k uᵀ      o = Sᵀ q
//! ```
//!
//! token by token, from zeros at the first token of a row. Heads of values share heads of queries and keys in groups. Scale and
//! normalisation of queries and keys are the caller's.

pub mod oracle;
