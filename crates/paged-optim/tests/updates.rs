//! The optimizers on every device of this machine: against the scalar oracle, under every budget, stopped and
//! resumed.

#![allow(clippy::unwrap_used, reason = "a failing unwrap is a failing test")]

mod common;

use std::sync::{Arc, Mutex};

use burn::tensor::{DType, Device, Tensor, TensorData};
use common::noise;
use paged_optim::reference::{self, Block8};
use paged_optim::{
    BLOCKSIZE, Budget, Clip, MemorySource, Moment, Moments, OptimError, Optimizer, OptimizerConfig, OptimizerKind,
    Update, global_norm,
};
use test_support::devices;

/// Odd lengths, several segments, a vector, parameters on either side of 4096, and more than one launch holds.
const LENS: [usize; 14] = [5, 4096, 4095, 8192, 1, 12_000, 70_001, 333, 64, 64, 64, 20_000, 4099, 256];

fn tensor(values: &[f32], device: &Device) -> Tensor<1> {
    Tensor::from_data(TensorData::new(values.to_vec(), [values.len()]), (device, DType::F32))
}

fn host(tensor: Tensor<1>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

fn config(kind: OptimizerKind) -> OptimizerConfig {
    OptimizerConfig { kind, weight_decay: 0.05, betas: (0.9, 0.99), ..Default::default() }
}

const LEARNING_RATE: f64 = 1e-3;
const MAX_NORM: f32 = 20.0;

fn params() -> Vec<Vec<f32>> {
    LENS.iter().enumerate().map(|(i, &len)| noise(1000 + i as u64, len)).collect()
}

fn grads(step: usize) -> Vec<Vec<f32>> {
    LENS.iter().enumerate().map(|(i, &len)| noise((step * 100 + i) as u64, len)).collect()
}

/// Whether parameter `i` has a gradient at `step`: one goes without now and then.
fn has_grad(step: usize, i: usize) -> bool {
    !(step + i).is_multiple_of(6)
}

/// One step on a device; returns the norm.
fn step(optimizer: &mut Optimizer, params: &mut [Vec<f32>], step: usize, device: &Device) -> f32 {
    let host_grads = grads(step);
    let present: Vec<usize> = (0..LENS.len()).filter(|&i| has_grad(step, i)).collect();
    let grads: Vec<Tensor<1>> = present.iter().map(|&i| tensor(&host_grads[i], device)).collect();
    let norm = global_norm(&grads).unwrap();
    let updates = present
        .iter()
        .zip(grads)
        .map(|(&index, grad)| Update { index, param: tensor(&params[index], device), grad })
        .collect();
    let updated = optimizer.step(updates, LEARNING_RATE, Some(Clip::new(norm.clone(), MAX_NORM))).unwrap();
    for (&index, param) in present.iter().zip(updated) {
        params[index] = host(param);
    }
    host(norm)[0]
}

/// One step of the oracle.
fn oracle_step(config: &OptimizerConfig, state: &mut [Moments], params: &mut [Vec<f32>], step: usize, norm: f32) {
    let scalars = config.scalars(step as u64, LEARNING_RATE, MAX_NORM);
    let factor = reference::gradient_factor(norm, &scalars).unwrap();
    for (i, g) in grads(step).iter().enumerate().filter(|(i, _)| has_grad(step, *i)) {
        let p = &mut params[i];
        match &mut state[i][..] {
            [Moment::Full(m), Moment::Full(v)] => reference::adamw(p, g, m, v, factor, &scalars),
            [Moment::Full(m)] => reference::lion(p, g, m, factor, &scalars),
            [Moment::Block8 { codes: m, absmax: m_absmax }, Moment::Block8 { codes: v, absmax: v_absmax }] => {
                for (b, p) in p.chunks_mut(BLOCKSIZE).enumerate() {
                    let range = b * BLOCKSIZE..b * BLOCKSIZE + p.len();
                    let m = Block8 { codes: &mut m[range.clone()], absmax: &mut m_absmax[b] };
                    let v = Block8 { codes: &mut v[range.clone()], absmax: &mut v_absmax[b] };
                    reference::adamw_8bit(p, &g[range], m, v, factor, &scalars);
                }
            }
            [Moment::Block8 { codes, absmax }] => {
                for (b, p) in p.chunks_mut(BLOCKSIZE).enumerate() {
                    let range = b * BLOCKSIZE..b * BLOCKSIZE + p.len();
                    let m = Block8 { codes: &mut codes[range.clone()], absmax: &mut absmax[b] };
                    reference::lion_8bit(p, &g[range], m, factor, &scalars);
                }
            }
            other => panic!("{other:?}"),
        }
    }
}

fn close(found: &[f32], expected: &[f32], absolute: f32, relative: f32) -> usize {
    assert_eq!(found.len(), expected.len());
    found.iter().zip(expected).filter(|(a, b)| (*a - *b).abs() > absolute + relative * b.abs()).count()
}

#[test]
fn every_device_follows_the_oracle() {
    for (name, device) in devices() {
        for kind in OptimizerKind::ALL {
            let config = config(kind);
            let mut optimizer = Optimizer::new(config, &LENS, &device, Budget::Unlimited);
            let mut params = params();
            for t in 1..=4 {
                // From the device's own state, so that a code that falls on the other side does not add up.
                let (mut state, mut expected) = (optimizer.state().unwrap(), params.clone());
                let norm = step(&mut optimizer, &mut params, t, &device);
                oracle_step(&config, &mut state, &mut expected, t, norm);
                let exact = name == "flex";
                for (i, (found, expected)) in params.iter().zip(&expected).enumerate() {
                    if exact {
                        assert_eq!(found, expected, "{name} {kind} step {t} parameter {i}");
                    } else {
                        // Fused multiplications, and WGSL's division and square root: a few ulp of the terms, of which
                        // the step is 1e-3 or a few times that. Where Lion's two terms cancel, rounding takes a side.
                        let off = close(found, expected, 2e-8, 1e-6);
                        let allowed = if kind == OptimizerKind::Lion8bit { 2 } else { 0 };
                        assert!(off <= allowed, "{name} {kind} step {t} parameter {i}: {off} off");
                    }
                }
                for (i, (found, expected)) in optimizer.state().unwrap().iter().zip(&state).enumerate() {
                    for (found, expected) in found.iter().zip(expected) {
                        same_moment(found, expected, exact, &format!("{name} {kind} step {t} parameter {i}"));
                    }
                }
            }
        }
    }
}

fn same_moment(found: &Moment, expected: &Moment, exact: bool, what: &str) {
    match (found, expected) {
        _ if exact => assert!(found == expected, "{what}"),
        (Moment::Full(found), Moment::Full(expected)) => {
            // Two products and a sum, fused or not.
            assert_eq!(close(found, expected, 1e-9, 1e-6), 0, "{what}");
        }
        (Moment::Block8 { codes, absmax }, Moment::Block8 { codes: expected_codes, absmax: expected_absmax }) => {
            assert_eq!(close(absmax, expected_absmax, 1e-12, 1e-6), 0, "{what}: absmax");
            let differing: Vec<_> = codes.iter().zip(expected_codes).filter(|(a, b)| a != b).collect();
            // A value within rounding of a threshold takes one of its two neighbours.
            assert!(differing.iter().all(|(a, b)| a.abs_diff(**b) == 1), "{what}: {differing:?}");
            assert!(differing.len() <= codes.len().div_ceil(2000), "{what}: {} codes", differing.len());
        }
        _ => panic!("{what}: another format"),
    }
}

fn bits(params: &[Vec<f32>]) -> Vec<Vec<u32>> {
    params.iter().map(|p| p.iter().map(|v| v.to_bits()).collect()).collect()
}

/// What the device has left over a run: less at every step, then more again.
struct Shrinking {
    capacity: u64,
    others: Arc<Mutex<u64>>,
}

impl MemorySource for Shrinking {
    fn free(&mut self, resident: u64) -> Option<(u64, u64)> {
        let others = *self.others.lock().unwrap();
        Some((self.capacity.saturating_sub(others + resident), self.capacity))
    }
}

#[test]
fn no_budget_changes_a_bit() {
    const STEPS: usize = 6;
    for (name, device) in devices() {
        for kind in OptimizerKind::ALL {
            let run = |budget: Budget| {
                let mut optimizer = Optimizer::new(config(kind), &LENS, &device, budget);
                let mut params = params();
                for t in 1..=STEPS {
                    step(&mut optimizer, &mut params, t, &device);
                    if let Budget::Bytes(bytes) = budget {
                        let paging = optimizer.paging();
                        // A 64th of the state, and the block that may be more than that.
                        let page = optimizer.state_bytes() / 64 + 4 * BLOCKSIZE as u64 * 2 + 16;
                        assert!(paging.pages <= 80, "{paging:?}: a small budget makes no crowd of pages");
                        assert!(paging.resident_bytes <= bytes.max(2 * page), "{paging:?} of {bytes}");
                    }
                }
                (bits(&params), optimizer.state().unwrap(), optimizer)
            };
            let (params, state, unlimited) = run(Budget::Unlimited);
            assert_eq!((unlimited.paging().bytes_in, unlimited.paging().evicted), (0, 0));
            let total = unlimited.state_bytes();
            for part in [0, total / 10, total / 2, total] {
                let (paged_params, paged_state, paged) = run(Budget::Bytes(part));
                let what = format!("{name} {kind} with {part} of {total} bytes: {:?}", paged.paging());
                let off = params.iter().flatten().zip(paged_params.iter().flatten()).filter(|(a, b)| a != b);
                assert_eq!(off.count(), 0, "{what}: parameters");
                let off = state.iter().zip(&paged_state).filter(|(a, b)| a != b);
                assert_eq!(off.count(), 0, "{what}: state");
                if part < total {
                    // All but what stays, and what a step had no gradient for, came back once a step.
                    let moved = (STEPS as u64 - 1) * (total - part) / 2;
                    assert!(paged.paging().bytes_in >= moved && paged.paging().evicted > 0, "{what}");
                }
            }
        }
    }
}

#[test]
fn state_makes_way_when_the_device_runs_short() {
    for (name, device) in devices() {
        let config = config(OptimizerKind::AdamW32bit);
        let mut whole = Optimizer::new(config, &LENS, &device, Budget::Unlimited);
        // Pages as a figure cuts them, so that some can stay and others go.
        let others = Arc::new(Mutex::new(0));
        let source = Shrinking { capacity: 1 << 20, others: others.clone() };
        let mut paged = Optimizer::with_source(config, &LENS, &device, Budget::Auto, Box::new(source));
        let (mut expected, mut found) = (params(), params());
        let mut evicted = Vec::new();
        for (t, used) in [0, 400, 800, 1200, 1024, 0].into_iter().enumerate() {
            *others.lock().unwrap() = used << 10;
            step(&mut whole, &mut expected, t + 1, &device);
            step(&mut paged, &mut found, t + 1, &device);
            evicted.push(paged.paging().evicted);
            assert!(bits(&found) == bits(&expected), "{name} step {}", t + 1);
        }
        // The state is 1 MB in one page of at most 16 MB: it goes as a whole, and comes back.
        assert_eq!(evicted[0], 0, "{name}: {evicted:?}");
        assert!(paged.paging().bytes_out > 0 && evicted[5] == 0, "{name}: {evicted:?} {:?}", paged.paging());
        let freed = paged.make_room().unwrap();
        assert_eq!((freed, paged.paging().resident_bytes), (paged.state_bytes(), 0), "{name}");
        step(&mut whole, &mut expected, 7, &device);
        step(&mut paged, &mut found, 7, &device);
        assert!(bits(&found) == bits(&expected), "{name} after making room");
        assert!(paged.state().unwrap() == whole.state().unwrap(), "{name}");
    }
}

#[test]
fn a_restored_optimizer_goes_on_bit_for_bit_under_any_budget() {
    for (name, device) in devices() {
        for kind in OptimizerKind::ALL {
            let mut whole = Optimizer::new(config(kind), &LENS, &device, Budget::Unlimited);
            let mut expected = params();
            (1..=5).for_each(|t| {
                step(&mut whole, &mut expected, t, &device);
            });
            let mut first = Optimizer::new(config(kind), &LENS, &device, Budget::Bytes(100_000));
            let mut params = params();
            (1..=3).for_each(|t| {
                step(&mut first, &mut params, t, &device);
            });
            let (updates, state) = (first.updates(), first.state().unwrap());
            let mut second = Optimizer::new(config(kind), &LENS, &device, Budget::Bytes(33_333));
            second.restore(updates, &state).unwrap();
            assert!(second.state().unwrap() == state, "{name} {kind}: what goes in comes out");
            (4..=5).for_each(|t| {
                step(&mut second, &mut params, t, &device);
            });
            let (found, expected) = (bits(&params), bits(&expected));
            let off = found.iter().flatten().zip(expected.iter().flatten()).filter(|(a, b)| a != b);
            assert_eq!(off.count(), 0, "{name} {kind}");
            assert!(second.state().unwrap() == whole.state().unwrap(), "{name} {kind}");
        }
    }
}

#[test]
fn gradients_that_are_not_finite_change_nothing() {
    for (name, device) in devices() {
        for kind in OptimizerKind::ALL {
            let mut optimizer = Optimizer::new(config(kind), &LENS, &device, Budget::Unlimited);
            let mut params = params();
            step(&mut optimizer, &mut params, 1, &device);
            let before = optimizer.state().unwrap();
            let mut grad = grads(2).swap_remove(3);
            grad[100] = f32::INFINITY;
            let grad = tensor(&grad, &device);
            let norm = global_norm([&grad]).unwrap();
            let update = Update { index: 3, param: tensor(&params[3], &device), grad };
            let updated = optimizer.step(vec![update], LEARNING_RATE, Some(Clip::new(norm, 1.0))).unwrap();
            let updated: Vec<Vec<f32>> = updated.into_iter().map(host).collect();
            assert_eq!(bits(&updated), bits(&params[3..4]), "{name} {kind}");
            assert!(optimizer.state().unwrap() == before, "{name} {kind}");
        }
    }
}

/// Gradients of a loss that was multiplied by a power of two, which is exact, give the bits of those of the loss itself; a
/// step that was void leaves no trace in the ones that follow.
#[test]
fn a_loss_scale_changes_no_bit() {
    for (name, device) in devices() {
        for kind in OptimizerKind::ALL {
            let run = |loss_scale: f32, void: bool| {
                let mut optimizer = Optimizer::new(config(kind), &LENS, &device, Budget::Unlimited);
                let mut params = params();
                let mut step = |t: usize, factor: f32| {
                    let grads: Vec<Tensor<1>> = grads(t)
                        .iter()
                        .map(|grad| tensor(&grad.iter().map(|g| g * factor).collect::<Vec<f32>>(), &device))
                        .collect();
                    let clip = Clip { loss_scale, ..Clip::new(global_norm(&grads).unwrap(), MAX_NORM) };
                    let update = |(index, grad)| Update { index, param: tensor(&params[index], &device), grad };
                    let updates = grads.into_iter().enumerate().map(update).collect();
                    params =
                        optimizer.step(updates, LEARNING_RATE, Some(clip)).unwrap().into_iter().map(host).collect();
                    if factor.is_infinite() {
                        optimizer.discount_void_step();
                    }
                };
                for t in 1..=3 {
                    if void && t == 2 {
                        step(t, f32::INFINITY);
                    }
                    step(t, loss_scale);
                }
                (bits(&params), optimizer.state().unwrap(), optimizer.updates())
            };
            let plain = run(1.0, false);
            assert_eq!(plain.2, 3);
            for (scale, void) in [(65536.0, false), (2.0, true), (0.5, true)] {
                assert!(run(scale, void) == plain, "{name} {kind}: {scale}, {void}");
            }
        }
    }
}

/// However many gradients there are, of whatever lengths; twice the same bits.
#[test]
fn the_global_norm_is_right_and_repeats() {
    for (name, device) in devices() {
        for count in [1, 3, 14] {
            let host_grads: Vec<Vec<f32>> = grads(7).into_iter().take(count).collect();
            let tensors: Vec<Tensor<1>> = host_grads.iter().map(|grad| tensor(grad, &device)).collect();
            let norms: Vec<f32> = (0..3).map(|_| host(global_norm(&tensors).unwrap())[0]).collect();
            let expected = host_grads.iter().flatten().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
            // A sum of positive terms in f32, in runs and trees: a few ulp.
            assert!((f64::from(norms[0]) / expected - 1.0).abs() < 1e-6, "{name}: {} against {expected}", norms[0]);
            assert!(norms.iter().all(|norm| norm.to_bits() == norms[0].to_bits()), "{name}: {norms:?}");
        }
    }
}

/// A parameter keeps its shape, and one that something else holds is not changed under it.
#[test]
fn parameters_of_any_shape_and_shared_ones() {
    for (name, device) in devices() {
        let mut optimizer = Optimizer::new(config(OptimizerKind::AdamW8bit), &[24, 3], &device, Budget::Auto);
        let cube = Tensor::<3>::ones([2, 3, 4], (&device, DType::F32));
        let vector = Tensor::<1>::ones([3], (&device, DType::F32));
        let (held, grad) = (cube.clone(), cube.clone());
        let updates = vec![Update::new(0, cube, grad), Update::new(1, vector.clone(), vector)];
        let updated = optimizer.step(updates, 0.1, None).unwrap();
        // The first step of AdamW is the learning rate, after a decay of 0.1 * 0.05.
        for tensor in &updated {
            // f32 around 0.9: a few ulp.
            assert!(host(tensor.clone()).iter().all(|x| (x - 0.895).abs() < 1e-6), "{name}: {tensor}");
        }
        assert_eq!(updated[0].clone().reshape([2, 3, 4]).dims(), [2, 3, 4]);
        assert!(held.into_data().iter::<f32>().all(|x| x == 1.0), "{name}");
    }
}

/// Updates that do not fit are errors that name the parameter, and nothing is changed.
#[test]
fn what_does_not_fit_is_refused() {
    for (name, device) in devices() {
        let mut optimizer = Optimizer::new(config(OptimizerKind::AdamW32bit), &[4, 3], &device, Budget::Unlimited)
            .with_names(vec!["first".into()]);
        let zeros = |len| Tensor::<1>::zeros([len], (&device, DType::F32));
        let update = |index, param, grad| Update { index, param: zeros(param), grad: zeros(grad) };
        let half = || Update { index: 1, param: zeros(3), grad: zeros(3).cast(DType::F16) };
        let mut refused = |updates: Vec<Update>| optimizer.step(updates, 0.1, None).unwrap_err().to_string();
        for (updates, expected) in [
            (vec![update(0, 5, 5)], "the value of first has 5 elements, expected 4"),
            (vec![update(1, 3, 4)], "the gradient of 1 has 4 elements, expected 3"),
            (vec![half()], "the gradient of 1 is F16"),
            (vec![update(0, 4, 4), update(1, 3, 3), update(0, 4, 4)], "parameter first has two updates"),
            (vec![update(0, 4, 4), update(2, 3, 3)], "parameter 2, but the optimizer has 2 parameters"),
        ] {
            let message = refused(updates);
            assert!(message.contains(expected), "{name}: {message}");
        }
        if name != "flex" {
            let elsewhere = || Tensor::<1>::zeros([4], (&Device::flex(), DType::F32));
            let message = refused(vec![Update { index: 0, param: zeros(4), grad: elsewhere() }]);
            assert!(message.contains("the gradient of first is on another device"), "{name}: {message}");
            assert!(matches!(global_norm([&zeros(4), &elsewhere()]), Err(OptimError::OtherDevice { .. })), "{name}");
        }
        assert_eq!(optimizer.updates(), 0, "{name}");
        assert!(matches!(global_norm::<1>([]), Err(OptimError::NoGradients)), "{name}");
        assert!(matches!(global_norm([&half().grad]), Err(OptimError::Dtype { .. })), "{name}");
    }
}
