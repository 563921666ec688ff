//! The global norm on CubeCL runtimes: few launches, and the same bits every time.
//!
//! Burn's sum over a whole tensor adds partial sums atomically on GPUs, in the order in which they come, so its last
//! bits differ from run to run, and with them all that clipping touches. Here each cube sums a fixed run of 4096 elements,
//! in a fixed order, to a place of its own; one more launch sums those and takes the root. As in [`super::kernels`] one
//! launch reads several gradients, and products keep their own rounding, so that it does not matter how many.

use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;

/// Units of a cube.
const UNITS: usize = 256;
/// Elements that a unit reads at a time.
const WIDTH: usize = 4;
/// Times that it does.
const ROUNDS: usize = 4;
/// Elements of a cube.
const RUN: usize = UNITS * WIDTH * ROUNDS;
/// Gradients of one launch, at most.
const MEMBERS: usize = 16;
/// Bindings besides those of gradients: partial sums, and CubeCL's own for sizes and scalars.
const OTHER_BINDINGS: usize = 3;

/// A gradient: its buffer and its length.
pub(super) type Gradient<'a> = (&'a Handle, usize);

/// The Euclidean norm of all gradients together, one f32.
pub(super) fn global_norm(client: &Client, grads: &[Gradient<'_>]) -> Handle {
    let runs: usize = grads.iter().map(|(_, len)| len.div_ceil(RUN)).sum();
    let partials = client.empty(4 * runs.max(1));
    let bindings = client.properties().hardware.max_bindings as usize;
    let most = bindings.saturating_sub(OTHER_BINDINGS).clamp(1, MEMBERS);
    let cube_dim = CubeDim::new_1d(UNITS as u32);
    let mut first = 0;
    let mut rest = grads;
    while !rest.is_empty() {
        let taken = if rest.len() >= most { most } else { 1 << rest.len().ilog2() };
        let (now, later) = rest.split_at(taken);
        let vector = if now.iter().all(|(_, len)| len.is_multiple_of(WIDTH)) { WIDTH } else { 1 };
        let longest = now.iter().map(|(_, len)| len.div_ceil(RUN)).max().unwrap_or(0);
        let members = member_args(now, vector, &mut first);
        if longest > 0 {
            // SAFETY: the buffers hold as many elements as is said, and there is a partial sum for every run.
            unsafe {
                squares_kernel::launch_unchecked(
                    client,
                    CubeCount::Static(longest as u32, taken as u32, 1),
                    cube_dim,
                    vector,
                    members,
                    BufferArg::from_raw_parts(partials.clone(), runs),
                    1.0,
                    taken,
                );
            }
        }
        rest = later;
    }
    let norm = client.empty(4);
    // SAFETY: there are `runs` partial sums and one result.
    unsafe {
        root_kernel::launch_unchecked(
            client,
            CubeCount::Static(1, 1, 1),
            cube_dim,
            BufferArg::from_raw_parts(partials, runs),
            BufferArg::from_raw_parts(norm.clone(), 1),
            runs as u32,
        );
    }
    norm
}

/// The launch's gradients as an argument; `N` is `vector`, `first` the place of the first partial sum.
fn member_args<N: Size>(grads: &[Gradient<'_>], vector: usize, first: &mut usize) -> SequenceArg<GradientArgs<N>> {
    let args = grads.iter().map(|(handle, len)| {
        // SAFETY: the buffer holds `len` elements, and `vector` divides that.
        let values = unsafe { BufferArg::from_raw_parts((*handle).clone(), len / vector) };
        let args = GradientArgsLaunch::new(values, *len as u32, *first as u32);
        *first += len.div_ceil(RUN);
        args
    });
    args.collect()
}

#[derive(CubeType, CubeLaunch)]
struct GradientArgs<N: Size> {
    values: Box<[Vector<f32, N>]>,
    len: u32,
    /// Place of its first partial sum.
    first: u32,
}

/// Adds up what the units have; the first unit's place holds the sum afterwards.
#[cube]
fn tree(sums: &mut [f32], unit: usize) {
    sync_cube();
    #[unroll]
    for level in 0..comptime!(UNITS.ilog2()) {
        let stride = comptime!(UNITS >> (level as usize + 1));
        if unit < stride {
            sums[unit] += sums[unit + stride];
        }
        sync_cube();
    }
}

#[cube(launch_unchecked)]
fn squares_kernel<N: Size>(
    members: &Sequence<GradientArgs<N>>,
    partials: &mut [f32],
    one: f32,
    #[comptime] count: usize,
) {
    let vector = N::value().comptime();
    let unit = UNIT_POS as usize;
    let mut sums = Shared::<[f32]>::new_slice(UNITS);
    let mut sum = 0.0f32;
    let mut place = 0usize;
    let mut inside = false;
    #[unroll]
    for k in 0..count {
        if CUBE_POS_Y == k as u32 {
            let member = members.index(k);
            let len = member.len as usize;
            place = (member.first + CUBE_POS_X) as usize;
            inside = CUBE_POS_X as usize * RUN < len;
            #[unroll]
            for round in 0..ROUNDS {
                let first = CUBE_POS_X as usize * RUN + round * comptime!(UNITS * WIDTH) + unit * WIDTH;
                #[unroll]
                for v in 0..comptime!(WIDTH / vector) {
                    let at = first + v * vector;
                    if at < len {
                        let values = member.values[at / vector];
                        #[unroll]
                        for i in 0..vector {
                            let value = values.extract(i);
                            sum += value * value * one;
                        }
                    }
                }
            }
        }
    }
    sums[unit] = sum;
    tree(&mut sums, unit);
    if inside && unit == 0 {
        partials[place] = sums[0];
    }
}

#[cube(launch_unchecked)]
fn root_kernel(partials: &[f32], norm: &mut [f32], runs: u32) {
    let unit = UNIT_POS as usize;
    let mut sums = Shared::<[f32]>::new_slice(UNITS);
    let mut sum = 0.0f32;
    let mut at = unit;
    while at < runs as usize {
        sum += partials[at];
        at += UNITS;
    }
    sums[unit] = sum;
    tree(&mut sums, unit);
    if unit == 0 {
        norm[0] = sums[0].sqrt();
    }
}
