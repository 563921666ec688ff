//! Gradients from card to card, by NCCL.

use std::sync::Arc;
use std::time::{Duration, Instant};

use burn::tensor::{DType, Device, Tensor};
use device_collectives::{CollectiveError, Collectives, Waited};
use host_copies::Reading;
use qlora_dist::{DistError, Group};

use super::SumBuckets;
use crate::error::TrainError;

/// How long NCCL's word for a rank that is gone waits for the group's, which names the rank.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// How often NCCL is asked for failures that it meets by itself, such as those of a network.
const ASK: Duration = Duration::from_secs(1);

/// The multiprocessors that operations take at most which run beside kernels. Two links of a network are filled by fewer, and
/// half of a block's weights come over NVLink in less time than the block before it computes.
pub(super) const CUBES_BESIDE: u32 = 4;
/// Bytes of gradients per second from which on sums are queued behind the backward pass. 640 MB take less than 16 ms then.
const FAST: f64 = 40e9;
/// Elements of the sum by which the rate is measured: 64 MB.
const TRIED: usize = 1 << 24;

/// The cards of all ranks.
#[derive(Debug)]
pub(super) struct Cards {
    pub(super) collectives: Arc<Collectives>,
    /// Whether sums run beside the backward pass.
    beside: bool,
}

impl Cards {
    /// Whether sums that take so many bytes per second should be made [beside](Self::beside) kernels.
    pub(super) fn is_slow(rate: f64) -> bool {
        // A rate that is no number is none that was measured.
        rate.is_nan() || rate < FAST
    }

    /// Cards whose operations run beside kernels, or between them.
    pub(super) fn new(collectives: Collectives, beside: bool) -> Self {
        Self { collectives: Arc::new(collectives), beside }
    }

    /// Bytes of gradients that are summed per second.
    ///
    /// # Errors
    /// As [`try_out`](Self::try_out).
    pub(super) fn rate(&self, device: &Device) -> Result<f64, String> {
        let sum = || -> Result<Duration, TrainError> {
            let zeros = Tensor::<2>::zeros([1, TRIED], (device, DType::F32));
            Reading::start(zeros.clone().slice([0..1, 0..1]).reshape([1]))?.wait()?;
            let start = Instant::now();
            let sum = self.collectives.sum(vec![zeros])?;
            let waited = self.collectives.wait()?;
            Reading::start(waited.broken)?.wait()?;
            drop(sum);
            Ok(start.elapsed())
        };
        // The first one makes NCCL's connections.
        let time = sum().and_then(|_| sum()).map_err(|error| error.to_string())?;
        Ok(4.0 * TRIED as f64 / time.as_secs_f64())
    }

    /// One sum, from the first kernel to the number on the host: whether it can be had is known after that. In words why not.
    pub(super) fn try_out(&self, device: &Device, ranks: usize) -> Result<(), String> {
        let try_out = || -> Result<f32, TrainError> {
            let ones = Tensor::<2>::ones([1, 4], (device, DType::F32));
            let sum = self.collectives.sum(vec![ones])?;
            let waited = self.collectives.wait()?;
            let sums = sum.into_iter().map(|sum| sum.reshape([4]).narrow(0, 0, 1) + waited.broken.clone());
            let numbers = Reading::start(Tensor::cat(sums.collect(), 0))?.wait()?;
            Ok(numbers.first().copied().unwrap_or(f32::NAN))
        };
        match try_out() {
            Ok(sum) if sum == ranks as f32 => Ok(()),
            Ok(sum) => Err(format!("NCCL sums 1 over {ranks} ranks to {sum}")),
            Err(error) => Err(error.to_string()),
        }
    }

    /// Ends the sums when a rank fails, and tells the ranks when the sums do.
    pub(super) fn watch(&self, group: &Arc<Group>) -> Result<(), DistError> {
        let (cards, of_group) = (Arc::downgrade(&self.collectives), Arc::downgrade(group));
        group.on_failure(move |_| {
            if let Some(cards) = cards.upgrade() {
                cards.abort();
            }
        })?;
        let cards = Arc::downgrade(&self.collectives);
        let ask = move || {
            while let (Some(cards), Some(group)) = (cards.upgrade(), of_group.upgrade()) {
                if let Some(problem) = cards.problem() {
                    // A rank that is gone has a name, which comes over its connection.
                    if group.failure().is_none() && failure_within(&group, LAST_WORDS).is_none() {
                        group.fail(&problem.to_string());
                    }
                    break;
                }
                drop((cards, group));
                std::thread::sleep(ASK);
            }
        };
        let spawned = std::thread::Builder::new().name("nccl-ask".into()).spawn(ask);
        spawned.map(drop).map_err(|source| DistError::System { rank: group.rank(), source })
    }
}

impl SumBuckets for Cards {
    fn beside(&self) -> bool {
        self.beside
    }

    fn queue(&self, group: &Group, bucket: Vec<Tensor<2>>) -> Result<Vec<Tensor<2>>, TrainError> {
        if self.beside {
            self.collectives.beside(true);
        }
        self.collectives.sum(bucket).map_err(|error| blamed(error, group))
    }

    fn queued(&self) -> usize {
        self.collectives.summed()
    }

    fn wait(&self, group: &Group) -> Result<Waited, TrainError> {
        let waited = self.collectives.wait().map_err(|error| blamed(error, group));
        if self.beside {
            self.collectives.beside(false);
        }
        waited
    }
}

/// The error of an operation: another rank's where one has failed.
fn blamed(error: CollectiveError, group: &Group) -> TrainError {
    match error {
        // This device's own.
        CollectiveError::Device(error) => error.into(),
        error => match failure_within(group, LAST_WORDS) {
            Some(failure) => failure.into(),
            None => error.into(),
        },
    }
}

/// The failure of a rank that is known now or soon.
fn failure_within(group: &Group, time: Duration) -> Option<DistError> {
    let deadline = Instant::now() + time;
    loop {
        match group.failure() {
            None if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(20)),
            failure => return failure,
        }
    }
}
