//! Training over several processes: what each rank does of a step, and how the step's gradients come together.
//!
//! Every rank reads all rows and knows all micro-batches of a step, so what has to be agreed on is little: gradients and losses are
//! summed, everything else follows from the same numbers on every rank. N ranks with k micro-batches each take the N k
//! micro-batches that one process would take, with their numbers in the step, by which dropout is drawn.
//!
//! On the CPU each micro-batch's gradients are sent apart and added in the order of the numbers, as one process adds them: the
//! result is its result, bit for bit. On other devices, where they would take memory that is short, a rank sends the sum of its
//! own.
//!
//! Between CUDA cards ([`SumBuckets`]) over a slow way the sums of a block's gradients are queued as soon as the last micro-batch's
//! backward pass is done with the block, and the device adds them up while it goes on with the next one. Over a fast way, such as NVLink,
//! they are queued behind the pass: sums that wait for another rank hold multiprocessors, which costs more than they take.

mod connect;
mod deal;
mod devices;
mod host;
mod shards;
mod sharers;

use std::fmt;
use std::sync::Arc;

use burn::tensor::{Device, Tensor};
use host_copies::DeviceError;
use qlora_dist::{DistError, Group, Place};
use qlora_layers::LayerError;
use qlora_models::ModelError;

use crate::engine::ParameterGrads;
use crate::error::TrainError;

pub use device_collectives::Waited;

/// Gradients of some of a step's micro-batches.
#[derive(Debug)]
pub(crate) struct Part {
    /// Where it stands in the sum over all ranks' parts.
    pub number: usize,
    /// What its micro-batches send, by their number in the step: `[n]`, the loss and as many figures behind it as any of them sends.
    pub losses: Vec<(usize, Tensor<1>)>,
    /// Gradients of the parameters by number, f32; `None` where none reached the parameter.
    pub grads: ParameterGrads,
}

/// The sums over all ranks.
#[derive(Debug)]
pub(crate) struct Summed {
    /// What all micro-batches sent in their order, `[n]` each.
    pub losses: Vec<Tensor<1>>,
    /// Gradients of the parameters by number, f32; `None` where none reached the parameter on any rank.
    pub grads: ParameterGrads,
}

/// A way for gradients from device to device, while the backward pass goes on.
///
/// All ranks queue the same buckets in the same order, whatever becomes of their micro-batches meanwhile.
pub trait SumBuckets: fmt::Debug + Send + Sync {
    /// Whether sums are to be queued while the backward pass goes on, rather than behind it.
    fn beside(&self) -> bool;

    /// Queues the sum of each tensor over all ranks, behind what the calling thread has queued. The results are not
    /// used before [`wait`](Self::wait).
    ///
    /// # Shapes
    /// f32, the same shapes on all ranks.
    ///
    /// # Errors
    /// What a tensor depends on failed, of this bucket or an earlier one, or another rank did. Of the buckets since the last wait
    /// the first [`queued`](Self::queued) are queued then, and the others may be queued again.
    fn queue(&self, group: &Group, bucket: Vec<Tensor<2>>) -> Result<Vec<Tensor<2>>, TrainError>;

    /// Buckets that are queued since the last wait that succeeded.
    fn queued(&self) -> usize;

    /// Has what the calling thread queues next begin when all sums are done.
    ///
    /// # Errors
    /// As [`queue`](Self::queue).
    fn wait(&self, group: &Group) -> Result<Waited, TrainError>;
}

/// How gradients travel.
#[derive(Clone, Debug)]
enum Way {
    /// Through the memory of the hosts.
    Hosts,
    /// From device to device.
    Devices(Arc<dyn SumBuckets>),
}

/// The ranks of a run, as training uses them.
#[derive(Clone, Debug)]
pub struct Ranks {
    group: Arc<Group>,
    way: Way,
}

impl Ranks {
    /// Ranks whose gradients go through the memory of their hosts.
    pub fn over_hosts(group: Group) -> Self {
        Self { group: Arc::new(group), way: Way::Hosts }
    }

    /// Ranks whose gradients go from device to device.
    pub fn over_devices(group: Group, way: Arc<dyn SumBuckets>) -> Self {
        Self { group: Arc::new(group), way: Way::Devices(way) }
    }

    /// This process's number.
    pub fn rank(&self) -> usize {
        self.group.rank()
    }

    /// How many ranks there are.
    pub fn count(&self) -> usize {
        self.group.world_size()
    }

    /// The ranks of this process's host, by the hosts' names, in their order.
    pub(crate) fn of_host(&self) -> Vec<usize> {
        let hosts = self.group.hosts();
        (0..self.count()).filter(|rank| hosts.get(*rank) == hosts.get(self.rank())).collect()
    }

    /// Where this process stands.
    pub fn place(&self) -> &Place {
        self.group.place()
    }

    /// Whether the gradients of each micro-batch are sent by themselves.
    pub(crate) fn keeps_apart(&self, device: &Device) -> bool {
        *device == Device::flex() && matches!(self.way, Way::Hosts)
    }

    /// The way from device to device, where gradients take it.
    pub(crate) fn devices(&self) -> Option<&Arc<dyn SumBuckets>> {
        match &self.way {
            Way::Hosts => None,
            Way::Devices(way) => Some(way),
        }
    }

    /// The ranks as they met.
    pub(crate) fn group(&self) -> &Group {
        &self.group
    }

    /// What has ended the ranks' operations, if something did.
    pub(crate) fn failure(&self) -> Option<DistError> {
        self.group.failure()
    }

    /// Which rank gets each of a step's micro-batches, by their sizes.
    pub(crate) fn deal(&self, sizes: &[usize]) -> Vec<usize> {
        deal::deal(sizes, self.count())
    }

    /// The sums over all ranks' parts, through the memory of the hosts.
    pub(crate) fn sum(
        &self,
        parts: Vec<Part>,
        shapes: &[[usize; 2]],
        sent: [usize; 2],
        device: &Device,
    ) -> Result<Summed, TrainError> {
        host::sum(&self.group, parts, shapes, sent, device)
    }

    /// Every rank's bytes, in the order of ranks, on every rank.
    ///
    /// # Errors
    /// Another rank failed.
    pub fn all_gather(&self, bytes: Vec<u8>) -> Result<Vec<Vec<u8>>, DistError> {
        self.group.all_gather(bytes)
    }

    /// Rank 0's bytes, on every rank.
    pub(crate) fn broadcast(&self, bytes: Vec<u8>) -> Result<Vec<u8>, DistError> {
        self.group.broadcast(bytes)
    }

    /// Whether the flag is raised on any rank. All ranks have come here when it returns.
    pub(crate) fn agree(&self, flag: bool) -> Result<bool, DistError> {
        self.group.agree(flag)
    }

    /// Refuses ranks that name other values.
    pub(crate) fn compare(&self, named: &[(String, String)]) -> Result<(), DistError> {
        self.group.compare(named)
    }

    /// The failure of another rank, where the error is what it led to: it may have come through a device's work, which knows no ranks.
    pub(crate) fn named(&self, error: TrainError) -> TrainError {
        match self.failure().filter(|_| is_of_peer(&error)) {
            Some(failure) => failure.into(),
            None => error,
        }
    }

    /// The result of this rank; the others are told if it failed. A rank that was stopped before the first step stops all.
    pub(crate) fn tell<T>(&self, result: Result<T, TrainError>) -> Result<T, TrainError> {
        let Err(error) = result else { return result };
        match self.named(error) {
            TrainError::Ranks(DistError::Rank { cause, .. }) if cause == TrainError::Stopped.to_string() => {
                Err(TrainError::Stopped)
            }
            error => {
                self.group.fail(&error.to_string());
                Err(error)
            }
        }
    }
}

/// Whether work failed for want of another process.
fn is_of_peer(error: &TrainError) -> bool {
    let (TrainError::Device(source)
    | TrainError::Model(
        ModelError::Device(source) | ModelError::Slots { source } | ModelError::Layer(LayerError::Read { source, .. }),
    )
    | TrainError::Layer(LayerError::Read { source, .. })) = error
    else {
        return false;
    };
    matches!(source, DeviceError::Peer(_))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use qlora_dist::{Place, Timeouts};

    #[test]
    fn what_another_rank_ended_is_told_with_its_name() {
        let ranks = Ranks::over_hosts(Group::join(Place::alone(), Timeouts::default()).unwrap());
        let of_peer = || ModelError::Slots { source: DeviceError::Peer("rank 1 on b: it was killed".into()) };
        // Nothing is known of a failure.
        assert!(matches!(ranks.tell::<()>(Err(of_peer().into())), Err(TrainError::Model(_))));
        // The failure that the call above has told.
        let read = LayerError::Read { what: "a weight".into(), source: DeviceError::Peer(String::new()) };
        let failures: [TrainError; 4] = [
            of_peer().into(),
            ModelError::Layer(read).into(),
            DeviceError::Peer(String::new()).into(),
            ModelError::Device(DeviceError::Peer(String::new())).into(),
        ];
        for error in failures {
            let words = error.to_string();
            assert!(matches!(ranks.tell::<()>(Err(error)), Err(TrainError::Ranks(DistError::Rank { .. }))), "{words}");
        }
        let own = DeviceError::Failed("a kernel".into());
        assert!(matches!(ranks.tell::<()>(Err(own.into())), Err(TrainError::Device(_))));
    }
}
