//! Whether what a merge wrote computes what base and adapter compute, before it is left.

use std::path::Path;

use anyhow::Result;
use burn_qlora::qlora_models::{Probed, probe_merge};
use burn_qlora::{Adapter, QuantConfig};

use crate::exit::InputError;
use crate::output::say;

/// Compares logits, and refuses a checkpoint that computes something else. `quantization` is what the base was rounded to.
pub fn merged(base: &Path, adapter: &Adapter, merged: &Path, quantization: Option<QuantConfig>) -> Result<()> {
    match probe_merge(base, adapter, merged, quantization)? {
        Probed::Compared(probe) if probe.agrees() => {
            say!(
                "Checked  logits of base and adapter and of the merged weights are {:.1e} apart in the mean (the adapter moves them by {:.1e})",
                probe.apart,
                probe.effect
            );
            Ok(())
        }
        Probed::Compared(probe) => Err(InputError(format!(
            "the merged checkpoint computes something else than base and adapter: their logits are {:.1e} apart in the mean, of {:.1e} at most, \
             where rounding explains {:.1e}; nothing was left. This is a bug, please report it; --no-verify leaves the checkpoint all the same",
            probe.apart,
            probe.largest,
            probe.bar * probe.largest
        ))
        .into()),
        Probed::NotCompared(why) => {
            say!("note: the merged checkpoint was not compared with base and adapter: {why}");
            Ok(())
        }
    }
}
