//! Buckets over ranks that are threads, whose sums go over TCP at once: order, results, and what becomes of them when something fails.

#![allow(clippy::unwrap_used)]

use std::net::TcpListener;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use burn::tensor::{Device, FloatDType, Tensor, TensorData};
use host_copies::DeviceError;
use qlora_data::{Batch, Example};
use qlora_dist::{DistError, Group, Place, Timeouts};
use qlora_layers::{ActivationCheckpointing, LoraConfig, TargetModules};
use qlora_models::{Decoder, LoadOptions, ModelConfig};

use crate::config::RunConfig;
use crate::engine::{Engine, StepOutput};
use crate::error::TrainError;
use crate::ranks::{Ranks, SumBuckets, Waited};

/// Sums over the group as they are queued.
#[derive(Debug, Default)]
struct AtOnce {
    /// Elements of the tensors of each bucket that was queued, and how many of them were waited for.
    queued: Mutex<Vec<Vec<usize>>>,
    waited: Mutex<usize>,
    /// The device has no memory for this bucket, once.
    short_at: Mutex<Option<usize>>,
    /// So many buckets after that one are taken before this is told, and are not queued.
    told_after: usize,
    late: Mutex<Option<usize>>,
    /// The wait finds the sums broken off.
    broken: bool,
    /// Buckets are queued behind the backward pass.
    behind: bool,
}

impl SumBuckets for AtOnce {
    fn beside(&self) -> bool {
        !self.behind
    }

    fn queue(&self, group: &Group, bucket: Vec<Tensor<2>>) -> Result<Vec<Tensor<2>>, TrainError> {
        let mut queued = self.queued.lock().unwrap();
        let mut late = self.late.lock().unwrap();
        if self.short_at.lock().unwrap().take_if(|at| *at == queued.len()).is_some() {
            *late = Some(self.told_after);
        }
        match &mut *late {
            Some(0) => {
                *late = None;
                return Err(short());
            }
            Some(left) => {
                *left -= 1;
                return Ok(bucket);
            }
            None => {}
        }
        queued.push(bucket.iter().map(|tensor| tensor.shape().num_elements()).collect());
        let sum = |tensor: Tensor<2>| {
            let (shape, device): ([usize; 2], Device) = (tensor.dims(), tensor.device());
            let mut values = tensor.try_into_vec_as::<f32>().map_err(DeviceError::from)?;
            group.all_reduce(&mut values)?;
            Ok(Tensor::from_data(TensorData::new(values, shape), &device))
        };
        bucket.into_iter().map(sum).collect()
    }

    fn queued(&self) -> usize {
        self.queued.lock().unwrap().len() - *self.waited.lock().unwrap()
    }

    fn wait(&self, _: &Group) -> Result<Waited, TrainError> {
        if self.late.lock().unwrap().take().is_some() {
            return Err(short());
        }
        *self.waited.lock().unwrap() = self.queued.lock().unwrap().len();
        if self.broken {
            // Long enough for the news of the rank that is gone.
            std::thread::sleep(Duration::from_millis(300));
        }
        let device = Device::flex();
        let broken = if self.broken { f32::NAN } else { 0.0 };
        Ok(Waited { broken: Tensor::from_data([broken], &device), seconds: Tensor::from_data([0.25], &device) })
    }
}

fn short() -> TrainError {
    DeviceError::OutOfMemory("for a test".into()).into()
}

fn engine(lora: &LoraConfig, ranks: Option<Ranks>) -> Engine {
    let dir = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/reference/tiny-llama"));
    let options = LoadOptions { quantization: None, dtype: FloatDType::F32 };
    let shape = ModelConfig::from_dir(dir).unwrap();
    let mut model = Decoder::random(shape, options, 7, &Device::flex(), &mut |_| {}).unwrap();
    model.attach_lora(lora, 7).unwrap();
    let options = RunConfig { max_grad_norm: 0.01, ..Default::default() };
    let lighter = vec![ActivationCheckpointing::Full.into()];
    let engine = crate::trainer::engine(model, &options, ActivationCheckpointing::None).unwrap();
    engine.with_lighter(lighter).with_ranks(ranks)
}

fn batches(count: usize) -> Vec<Batch> {
    let row = |batch: usize, len: usize| {
        let id = |i: usize| ((batch * 31 + i * 7) % 50) as u32;
        Example { input_ids: (0..len).map(id).collect(), labels: (0..len).map(|i| id(i).into()).collect(), line: 1 }
    };
    (0..count).map(|batch| Batch::new(&[row(batch, 9 + batch), row(batch + 100, 5)], 0)).collect()
}

/// Losses, norms and the sums of all parameters after some steps.
#[derive(Debug, PartialEq)]
struct Found {
    steps: Vec<(u64, u64)>,
    parameters: Vec<(String, u32)>,
}

fn found(mut engine: Engine, batches: &[Batch]) -> Result<(Found, StepOutput), TrainError> {
    let mut steps = Vec::new();
    for step in 0..2 {
        steps.push(engine.step(batches, 1e-2, step)?);
    }
    let parameters = engine.checksums()?.into_iter().map(|(name, sum)| (name, sum.to_bits())).collect();
    let bits = steps.iter().map(|step| (step.loss.to_bits(), step.grad_norm.to_bits())).collect();
    Ok((Found { steps: bits, parameters }, steps[1]))
}

/// What `work` gives on each of two ranks.
fn ranks<T: Send>(work: impl Fn(Group) -> T + Sync) -> Vec<T> {
    let port = TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port();
    let timeouts = Timeouts { rendezvous: Duration::from_secs(20), silence: Duration::from_secs(20) };
    let work = &work;
    std::thread::scope(|scope| {
        let rank = |rank| {
            let place = Place { rank, world_size: 2, local_rank: rank, master_port: port, ..Place::alone() };
            scope.spawn(move || work(Group::join(place, timeouts).unwrap()))
        };
        let threads: Vec<_> = (0..2).map(rank).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn plain() -> LoraConfig {
    LoraConfig { rank: 4, alpha: 8.0, dropout: 0.1, ..Default::default() }
}

/// Adapters in blocks, below them and above.
fn ends() -> LoraConfig {
    let names = ["q_proj", "down_proj", "embed_tokens", "lm_head"].map(String::from);
    LoraConfig { target_modules: TargetModules::Names(names.to_vec()), ..plain() }
}

/// With one micro-batch a rank, the sum of two is the same in either order: one process's bits. A step of one micro-batch leaves a rank
/// with nothing of its own.
#[test]
fn sums_under_way_are_one_processs() {
    for lora in [plain(), ends()] {
        for (count, behind) in [(2, false), (1, false), (2, true), (1, true)] {
            let batches = batches(count);
            let (one, _) = found(engine(&lora, None), &batches).unwrap();
            let of_ranks = ranks(|group| {
                let way = Arc::new(AtOnce { behind, ..AtOnce::default() });
                let (found, last) =
                    found(engine(&lora, Some(Ranks::over_devices(group, way.clone()))), &batches).unwrap();
                assert_eq!(last.waited_seconds, Some(0.25));
                let queued = way.queued.lock().unwrap().clone();
                (found, queued)
            });
            for (found, queued) in &of_ranks {
                assert_eq!(*found, one, "{count} micro-batches");
                assert_eq!(*queued, of_ranks[0].1, "all ranks queue the same");
            }
            // Two steps, each of the blocks and what is beside them.
            let blocks = engine(&lora, None).model().blocks().len();
            let queued = &of_ranks[0].1;
            assert_eq!(queued.len(), 2 * (blocks + 1));
            assert_eq!(queued[blocks].last(), Some(&count), "the losses come last");
        }
    }
}

/// Several micro-batches a rank: sums in another order, so last bits may differ. Gradients of this model are sums of some hundred
/// products in f32.
#[test]
fn several_micro_batches_a_rank_give_nearly_one_processs() {
    let batches = batches(5);
    let (one, last_of_one) = found(engine(&plain(), None), &batches).unwrap();
    let of_ranks = ranks(|group| {
        let way = Arc::new(AtOnce::default());
        found(engine(&plain(), Some(Ranks::over_devices(group, way))), &batches).unwrap()
    });
    assert_eq!(of_ranks[0].0, of_ranks[1].0, "ranks have the same bits");
    let last = of_ranks[0].1;
    assert!((last.loss - last_of_one.loss).abs() < 1e-5 && (last.grad_norm / last_of_one.grad_norm - 1.0).abs() < 1e-4);
    for ((name, a), (_, b)) in of_ranks[0].0.parameters.iter().zip(&one.parameters) {
        let [a, b] = [*a, *b].map(f32::from_bits);
        assert!((a - b).abs() <= 1e-3 * b.abs().max(1e-3), "{name}: {a} and {b}");
    }
}

/// A rank that is short of memory in the midst of its buckets does its step once more, and queues none of them twice.
#[test]
fn a_step_that_is_done_once_more_queues_each_bucket_once() {
    let batches = batches(4);
    let of = |short_at: Option<usize>, told_after: usize| {
        ranks(|group| {
            let short_at = Mutex::new(short_at.filter(|_| group.rank() == 1));
            let way = Arc::new(AtOnce { short_at, told_after, ..Default::default() });
            let (found, _) = found(engine(&ends(), Some(Ranks::over_devices(group, way.clone()))), &batches).unwrap();
            let queued = way.queued.lock().unwrap().len();
            (found, queued)
        })
    };
    let whole = of(None, 0);
    let last = whole[0].1 / 2 - 1;
    // At once, or later: in the midst of the step or at its end.
    for (short_at, told_after) in [(0, 0), (1, 0), (last, 0), (0, 1), (0, 9), (1, 9), (last, 1)] {
        assert_eq!(of(Some(short_at), told_after), whole, "short at bucket {short_at}, told after {told_after}");
    }
}

/// Sums that were broken off change nothing, and the step's error is the rank's that is gone.
#[test]
fn sums_that_are_broken_off_change_nothing() {
    let batches = batches(2);
    let errors = ranks(|group| {
        let (first, rank) = (group.rank() == 0, group.rank());
        let way = Arc::new(AtOnce { broken: first, ..Default::default() });
        let ranks = Ranks::over_devices(group, way);
        let mut engine = engine(&plain(), Some(ranks.clone()));
        let before = engine.checksums().unwrap();
        if rank == 1 {
            engine.step(&batches, 1e-2, 0).unwrap();
            ranks.group().fail("its card is gone");
            return None;
        }
        let error = loop {
            match engine.step(&batches, 1e-2, 0) {
                Err(TrainError::NotFinite { .. }) => continue,
                other => break other.unwrap_err(),
            }
        };
        assert_eq!(engine.checksums().unwrap(), before);
        Some(error)
    });
    let Some(TrainError::Ranks(DistError::Rank { rank: 1, cause, .. })) = &errors[0] else { panic!("{errors:?}") };
    assert_eq!(cause, "its card is gone");
}
