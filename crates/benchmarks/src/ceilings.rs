//! What the card gives at best, measured right before the kernels.
//!
//! Copy bandwidth: bytes read and written by a plain copy far larger than every cache. Dense peak: the
//! fastest bf16 product that is at hand, whoever's it is, on the larger of these shapes.

use anyhow::Result;

use crate::bench::Bench;
use crate::case::Run;
use crate::families;
use crate::timer::Timer;

/// Bytes per second and operations per second, and whose kernels reached them.
#[derive(Debug, Clone)]
pub(crate) struct Ceilings {
    pub bandwidth: f64,
    pub bandwidth_by: String,
    /// `None` where nothing multiplies.
    pub flops: Option<(f64, String)>,
}

impl Ceilings {
    /// Ours; a peer's may be higher.
    pub(crate) fn measure(bench: &Bench, timer: &Timer) -> Result<Self> {
        // A software device needs no gigabyte.
        let bytes = if cuda_source::device(&bench.client).is_some() { 1 << 30 } else { 1 << 26 };
        let from = bench.random(bytes / bench.format.size(), 1, 1.0);
        let to = bench.client.empty(bytes);
        let outputs = vec![to.clone()];
        let copier = bench.clone();
        let call = Box::new(move |_| {
            copier.copy(&from, &to, bytes);
            Ok(())
        });
        let mut copy = Run { call, outputs };
        let bandwidth = (2 * bytes) as f64 / timer.time(&mut copy)?.seconds;
        let mut ceilings = Self { bandwidth, bandwidth_by: "a copy kernel".into(), flops: None };
        for case in families::peak(bench) {
            let mut run = (case.prepare)(bench)?;
            ceilings.offer_flops(case.work.flops as f64 / timer.time(&mut run)?.seconds, case.name().trim_end());
        }
        Ok(ceilings)
    }

    /// Takes a higher bandwidth.
    pub(crate) fn offer_bandwidth(&mut self, value: f64, by: &str) {
        if value > self.bandwidth {
            (self.bandwidth, self.bandwidth_by) = (value, by.to_owned());
        }
    }

    /// Takes a higher rate of operations.
    pub(crate) fn offer_flops(&mut self, value: f64, by: &str) {
        if self.flops.as_ref().is_none_or(|(best, _)| value > *best) {
            self.flops = Some((value, by.to_owned()));
        }
    }
}
