//! `[distributed]`: several processes that train together.

use serde::{Deserialize, Serialize};

/// `[distributed]`: what a run of several ranks does otherwise than a run of one. All ranks need the same.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DistributedConfig {
    /// How gradients come from rank to rank.
    pub transport: Transport,
    /// Whether each rank holds a part of the frozen weights alone, and gets the others' when it computes with them. The results are the same.
    pub shard_base: bool,
}

/// How gradients come from rank to rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// From card to card where all ranks have CUDA cards and NCCL, else over TCP.
    #[default]
    Auto,
    /// From card to card, by NCCL, or not at all.
    Nccl,
    /// Through the memory of the hosts.
    Tcp,
}
