//! Ranks on the CUDA cards of this machine: one process with itself, and two, each with a card of its own.

#![allow(clippy::unwrap_used, reason = "a failing unwrap is a failing test")]

use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use device_collectives::{CollectiveError, Collectives, Endpoint, Nccl};
use host_copies::Reading;
use test_support::{client, skipped};

/// Tells a process which rank it is, and where NCCL's id lies.
const RANK: &str = "DEVICE_COLLECTIVES_RANK";
const FOLDER: &str = "DEVICE_COLLECTIVES_FOLDER";

/// NCCL, where there are so many cards and the library.
fn nccl(cards: usize) -> Option<Nccl> {
    client("cuda")?;
    let found = cudarc::driver::CudaContext::device_count().map_or(0, |count| count as usize);
    if found < cards {
        skipped(format_args!("{found} of the {cards} cards of this test are there"));
        return None;
    }
    match Nccl::load() {
        Ok(nccl) => Some(nccl),
        Err(error) => {
            skipped(error);
            None
        }
    }
}

fn values(len: usize, rank: usize) -> Vec<f32> {
    (0..len).map(|i| (i % 1000) as f32 * 0.5 + rank as f32).collect()
}

fn tensor(shape: [usize; 2], rank: usize, device: &Device) -> Tensor<2> {
    // A product by 1 is a tensor that a kernel makes, as gradients are.
    Tensor::from_data(TensorData::new(values(shape[0] * shape[1], rank), shape), (device, DType::F32)) * 1.0
}

fn host(tensor: Tensor<2>) -> Vec<f32> {
    tensor.try_into_vec_as::<f32>().unwrap()
}

/// Sums of several buckets, each after work on CubeCL's stream, used by work on it.
fn sums(collectives: &Collectives, device: &Device, rank: usize) {
    let world_size = collectives.world_size();
    let shapes = [[3, 7], [64, 4096], [1, 1], [4096, 1000]];
    for round in 0..3 {
        let mut summed = Vec::new();
        let mut held = Vec::new();
        for shape in shapes {
            // Twice itself and back again: the sum must not begin before.
            let x = tensor(shape, rank, device);
            let x = (x.clone() + x) * 0.5;
            // What others hold is not summed in its place.
            if round == 1 {
                held.push(x.clone());
            }
            summed.push(collectives.sum(vec![x.clone(), x * 2.0]).unwrap());
        }
        let waited = collectives.wait().unwrap();
        let broken = Reading::start(waited.broken).unwrap();
        for (shape, pair) in shapes.into_iter().zip(summed) {
            for (factor, sum) in [1.0, 2.0].into_iter().zip(pair) {
                // Small whole numbers and halves: sums are exact in any order.
                let len = shape[0] * shape[1];
                let parts: Vec<Vec<f32>> = (0..world_size).map(|rank| values(len, rank)).collect();
                let expected: Vec<f32> =
                    (0..len).map(|i| factor * parts.iter().map(|part| part[i]).sum::<f32>()).collect();
                assert!(host(sum) == expected, "round {round}, {shape:?}, rank {rank}");
            }
        }
        for (shape, held) in shapes.into_iter().zip(held) {
            assert!(host(held) == values(shape[0] * shape[1], rank), "{shape:?}, rank {rank}");
        }
        assert_eq!(broken.wait().unwrap(), [0.0]);
    }
}

/// Bytes of every kind arrive as they are, those that are NaN as floats among them.
fn gathers(collectives: &Collectives, device: &Device, rank: usize) {
    let world_size = collectives.world_size();
    let words = |rank: usize| -> Vec<i32> { (0..5000).map(|i| (0x7fc0_0000 ^ (i * 7919)) | rank as i32).collect() };
    let from = Tensor::<1, Int>::from_data(TensorData::new(words(rank), [5000]), (device, DType::I32));
    let to = Tensor::<1, Int>::zeros([5000 * world_size + 7], (device, DType::I32));
    let [source, target] = [&from, &to].map(|tensor| collectives.fix(tensor).unwrap());
    let expected: Vec<i32> = (0..world_size).flat_map(words).collect();
    for _ in 0..3 {
        let mark = collectives.gather(&source, &target).unwrap();
        // What is queued between is not waited for.
        let sum = collectives.sum(vec![tensor([4096, 1000], rank, device)]).unwrap();
        drop(collectives.wait_for(mark).unwrap());
        assert_eq!(to.clone().try_into_vec_as::<i32>().unwrap()[..5000 * world_size], expected);
        drop(collectives.wait().unwrap());
        assert_eq!(host(sum.into_iter().next().unwrap())[0], (0..world_size).sum::<usize>() as f32);
    }
    let error = collectives.gather(&target, &source).unwrap_err();
    assert!(matches!(error, CollectiveError::Layout { .. }), "{error}");
}

#[test]
fn one_rank_sums_with_itself() {
    let Some(nccl) = nccl(1) else { return };
    let device = Device::cuda(0);
    let id = nccl.unique_id().unwrap();
    let collectives = Endpoint::new(nccl, &device).unwrap().join(0, 1, &id, None, || false).unwrap();
    sums(&collectives, &device, 0);
    gathers(&collectives, &device, 0);
    collectives.abort();
    // Asked for, and given up by whoever queues it.
    drop(collectives.sum(vec![tensor([2, 2], 0, &device)]).unwrap());
    assert_eq!(collectives.wait().unwrap_err(), CollectiveError::Aborted);
    assert_eq!(collectives.summed(), 0);
    let waited = collectives.wait().unwrap();
    assert!(
        Reading::start(waited.broken).unwrap().wait().unwrap()[0].is_nan(),
        "what was broken off is told on the device"
    );
}

#[test]
fn nobody_waits_for_a_rank_that_never_comes() {
    let Some(nccl) = nccl(1) else { return };
    let id = nccl.unique_id().unwrap();
    let start = Instant::now();
    let over = || start.elapsed() > Duration::from_secs(2);
    let error = Endpoint::new(nccl, &Device::cuda(0)).unwrap().join(0, 2, &id, None, over).unwrap_err();
    assert_eq!(error, CollectiveError::Aborted);
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
}

/// Starts this test once more, as each of two ranks.
fn spawn(test: &str, folder: &Path) -> Vec<Child> {
    let rank = |rank: usize| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args([test, "--exact", "--nocapture"]).env(RANK, rank.to_string()).env(FOLDER, folder);
        command.spawn().unwrap()
    };
    (0..2).map(rank).collect()
}

/// The rank that this process is, with the other one.
fn joined(nccl: Nccl) -> Option<(Collectives, Device, usize)> {
    let rank: usize = std::env::var(RANK).ok()?.parse().unwrap();
    let path = Path::new(&std::env::var_os(FOLDER).unwrap()).join("id");
    if rank == 0 {
        let id = nccl.unique_id().unwrap();
        std::fs::write(path.with_extension("new"), &id).unwrap();
        std::fs::rename(path.with_extension("new"), &path).unwrap();
    }
    let deadline = Instant::now() + Duration::from_secs(60);
    let id = loop {
        match std::fs::read(&path) {
            Ok(id) => break id,
            Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(10)),
            Err(error) => panic!("rank 0 gave no id: {error}"),
        }
    };
    let device = Device::cuda(rank);
    Some((Endpoint::new(nccl, &device).unwrap().join(rank, 2, &id, None, || false).unwrap(), device, rank))
}

#[test]
fn two_ranks_sum_over_their_cards() {
    let Some(nccl) = nccl(2) else { return };
    if let Some((collectives, device, rank)) = joined(nccl) {
        sums(&collectives, &device, rank);
        gathers(&collectives, &device, rank);
        late(&collectives, &device, rank);
        rates(&collectives, &device, rank);
        // The other one may still read from this one's memory.
        std::thread::sleep(Duration::from_secs(1));
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    for mut child in spawn("two_ranks_sum_over_their_cards", folder.path()) {
        assert!(child.wait().unwrap().success());
    }
}

/// Sums begin after the work that gives what is summed, and work that uses them after the sums, however long either takes: here one
/// rank's host is late, and then one rank's device.
fn late(collectives: &Collectives, device: &Device, rank: usize) {
    let x = Tensor::<2>::ones([4096, 4096], (device, DType::F32));
    // Some 10 ms each on a card of today.
    let long = |x: &Tensor<2>| (0..400).fold(x.clone(), |x, i| if i % 2 == 0 { x * 2.0 } else { x * 0.5 });
    for late in 0..2 {
        for of_host in [true, false] {
            device.sync().unwrap();
            if of_host && rank == late {
                std::thread::sleep(Duration::from_millis(700));
            }
            let mut summed = Vec::new();
            for bucket in 0..6 {
                let part = if !of_host && rank == late { long(&x) } else { x.clone() * 1.0 };
                summed.extend(collectives.sum(vec![part * (bucket as f32 + 1.0)]).unwrap());
                // In the way of memory that is not kept.
                drop(x.clone() * f32::NAN);
            }
            let waited = collectives.wait().unwrap();
            let all = summed.iter().flat_map(|sum| [sum.clone().min(), sum.clone().max()]).collect();
            let numbers = Tensor::cat(vec![Tensor::cat(all, 0), waited.broken, waited.seconds], 0);
            let numbers = Reading::start(numbers).unwrap().wait().unwrap();
            let expected: Vec<f32> = (1..=6).flat_map(|factor| [2.0 * factor as f32; 2]).collect();
            assert_eq!(numbers[..12], expected, "late {late}, rank {rank}, host {of_host}: {numbers:?}");
            let [broken, seconds] = numbers[12..] else { panic!("{numbers:?}") };
            assert_eq!(broken, 0.0);
            test_support::say(format_args!("rank {late}'s host is late ({of_host}): rank {rank} waited {seconds} s"));
            if of_host && rank != late {
                assert!((0.4..1.5).contains(&seconds), "rank {rank} waited {seconds} s");
            }
        }
    }
}

/// What 640 MB take, and how much of it work on CubeCL's stream hides: said, not tested, as it is the machine's.
fn rates(collectives: &Collectives, device: &Device, rank: usize) {
    let timed = |of: &mut dyn FnMut() -> f32| {
        let mut seconds: Vec<f32> = (0..5).map(|_| of()).collect();
        seconds.sort_by(f32::total_cmp);
        seconds[2]
    };
    let tensors = || (0..32).map(|_| Tensor::<2>::ones([1000, 5000], (device, DType::F32))).collect::<Vec<_>>();
    let read = |tensor: Tensor<1>| Reading::start(tensor).unwrap().wait().unwrap()[0];
    let alone = timed(&mut || {
        let tensors = tensors();
        device.sync().unwrap();
        let start = Instant::now();
        tensors.into_iter().for_each(|tensor| drop(collectives.sum(vec![tensor]).unwrap()));
        read(collectives.wait().unwrap().broken);
        start.elapsed().as_secs_f32()
    });
    let x = Tensor::<2>::ones([8192, 8192], (device, DType::F32));
    let work = |x: &Tensor<2>| (0..20).fold(x.clone(), |x, _| x * 1.0001);
    let without = timed(&mut || {
        device.sync().unwrap();
        let start = Instant::now();
        (0..32).for_each(|_| drop(work(&x)));
        device.sync().unwrap();
        start.elapsed().as_secs_f32()
    });
    let mut waited = 0.0;
    let both = timed(&mut || {
        let tensors = tensors();
        device.sync().unwrap();
        let start = Instant::now();
        let mut summed = Vec::new();
        for tensor in tensors {
            summed.push(collectives.sum(vec![tensor]).unwrap());
            drop(work(&x));
        }
        waited = read(collectives.wait().unwrap().seconds);
        start.elapsed().as_secs_f32()
    });
    if rank == 0 {
        test_support::say(format_args!(
            "640 MB in 32 sums: {:.1} ms alone, {:.1} ms of other work without, {:.1} ms with them, of which {:.1} ms waiting",
            1e3 * alone,
            1e3 * without,
            1e3 * both,
            1e3 * waited
        ));
    }
}

/// A rank that is gone: the other one's device waits for it, and an abort ends that.
#[test]
fn an_abort_ends_what_waits_for_a_rank_that_is_gone() {
    let Some(nccl) = nccl(2) else { return };
    if let Some((collectives, device, rank)) = joined(nccl) {
        sums(&collectives, &device, rank);
        if rank == 1 {
            std::thread::sleep(Duration::from_secs(1));
            std::process::abort();
        }
        std::thread::sleep(Duration::from_secs(2));
        let collectives = std::sync::Arc::new(collectives);
        let monitor = std::sync::Arc::clone(&collectives);
        let start = Instant::now();
        let thread = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_secs(3));
            monitor.abort();
        });
        let sum = collectives.sum(vec![tensor([512, 4096], rank, &device)]).unwrap();
        let broken = match collectives.wait() {
            Ok(waited) => read_first(waited.broken),
            // NCCL may notice by itself.
            Err(error) => {
                test_support::say(format_args!("the sum was refused: {error}"));
                f32::NAN
            }
        };
        drop(sum);
        assert!(broken.is_nan(), "{broken}");
        let took = start.elapsed();
        test_support::say(format_args!("an abort after 3 s ended the sum after {:.1} s", took.as_secs_f64()));
        assert!(took < Duration::from_secs(30), "{took:?}");
        thread.join().unwrap();
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let mut children = spawn("an_abort_ends_what_waits_for_a_rank_that_is_gone", folder.path());
    assert!(!children[1].wait().unwrap().success(), "it was to be gone");
    assert!(children[0].wait().unwrap().success());
}

fn read_first(tensor: Tensor<1>) -> f32 {
    Reading::start(tensor).unwrap().wait().unwrap()[0]
}
