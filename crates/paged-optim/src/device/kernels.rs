//! The kernels: one launch updates several segments of a page.
//!
//! The grid's y is the segment, its x the segment's elements. A unit takes four consecutive elements at a time, in
//! vectors of 16 bytes where every segment of the launch allows it, and with 8-bit state their codes as one word. The
//! 64 units of a block of 256 elements find its new absmax by a tree over shared memory; the maps lie in shared memory
//! too, and a cube stays for several rounds so that loading them does not count.
//!
//! A kernel has a binding for parameter and gradient of every segment: there is a variant for each number of segments, up
//! to [`MEMBERS`].
//!
//! Every operation is written as in [`crate::reference`], and rounded as there: compilers fuse a * b + c into one
//! operation with one rounding, differently in each variant of a kernel, so that the cuts between pages would show in
//! the results. Hence (a * b) * one + c with a `one` passed at run time: fused, that is round(round(a * b) * 1 + c).
//! What is left is WGSL's division and square root, which may be off by 2.5 units in the last place.

use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;

use crate::BLOCKSIZE;
use crate::config::{Rule, Scalars};
use crate::dynamic_map::{self, SIGNED_ZERO};
use crate::layout::{Format, PageLayout, Segment};

/// Units of a cube.
const UNITS: usize = 256;
/// Elements that a unit takes at a time.
const WIDTH: usize = 4;
/// Elements that a cube takes at a time: four blocks.
const ROUND: usize = UNITS * WIDTH;
/// Units of a block of 8-bit state.
const UNITS_PER_BLOCK: usize = BLOCKSIZE / WIDTH;
/// Rounds of a cube with 8-bit state: its 4 KiB of tables for 16 KiB and more of each operand.
const ROUNDS: usize = 4;
/// Segments of one launch, at most: a page of adapters of rank 64 has about as many.
const MEMBERS: usize = 8;
/// Bindings besides those of the segments: state, norm, tables, and CubeCL's own for sizes and scalars.
const OTHER_BINDINGS: usize = 5;

/// Positions in the tables: the signed map, its thresholds, the unsigned map, its thresholds.
const SIGNED: usize = 0;
const UNSIGNED: usize = 512;
const TABLES: usize = 1024;

/// A segment with its parameter's buffers and the scalars of its update.
pub(super) struct Member<'a> {
    pub(super) segment: Segment,
    pub(super) param: &'a Handle,
    pub(super) grad: &'a Handle,
    pub(super) scalars: Scalars,
}

/// A page that is updated.
pub(super) struct Page<'a> {
    pub(super) rule: Rule,
    pub(super) layout: &'a PageLayout,
    /// `layout.words` words of state.
    pub(super) words: &'a Handle,
    /// One f32.
    pub(super) norm: &'a Handle,
    /// What [`tables`] gave; pages of 32-bit state have no use for them.
    pub(super) tables: Option<&'a Handle>,
}

/// Both maps and their thresholds.
pub(super) fn tables(client: &Client) -> Handle {
    let mut values = Vec::with_capacity(TABLES);
    for map in [dynamic_map::signed(), dynamic_map::unsigned()] {
        values.extend_from_slice(map.values());
        values.extend_from_slice(map.thresholds());
        // Never read: a search looks at 255 thresholds.
        values.push(f32::MAX);
    }
    client.create_from_slice(bytemuck::cast_slice(&values))
}

/// Updates the segments of a page. A launch has one set of scalars: members that differ in learning rate, weight decay
/// or number of updates are in different launches.
pub(super) fn update(client: &Client, page: &Page<'_>, members: Vec<Member<'_>>) {
    let bindings = client.properties().hardware.max_bindings as usize;
    let most = (bindings.saturating_sub(OTHER_BINDINGS) / 2).clamp(1, MEMBERS);
    let mut rest = members;
    while let Some(first) = rest.first() {
        let scalars = first.scalars;
        let (members, others): (Vec<_>, Vec<_>) = rest.into_iter().partition(|member| member.scalars == scalars);
        // As few launches as the bindings allow, of about the same size.
        let launches = members.len().div_ceil(most);
        for members in members.chunks(members.len().div_ceil(launches)) {
            launch(client, page, members, scalars);
        }
        rest = others;
    }
}

fn launch(client: &Client, page: &Page<'_>, members: &[Member<'_>], scalars: Scalars) {
    let Page { rule, layout, words, norm, tables } = *page;
    // Segments start at multiples of 256, so it is their length that decides.
    let aligned = members.iter().all(|member| member.segment.len.is_multiple_of(WIDTH));
    let vector = if aligned { WIDTH } else { 1 };
    let longest = members.iter().map(|member| member.segment.len).max().unwrap_or(0);
    let per_cube = if layout.format == Format::Full { ROUND } else { ROUND * ROUNDS };
    let cubes = CubeCount::Static(longest.div_ceil(per_cube) as u32, members.len() as u32, 1);
    let cube_dim = CubeDim::new_1d(UNITS as u32);
    let count = members.len();
    let Scalars { beta1, rest1, beta2, rest2, step_size, correction2, eps, keep, max_norm, unscale } = scalars;
    let scalars =
        ScalarArgsLaunch::new(beta1, rest1, beta2, rest2, step_size, correction2, eps, keep, max_norm, unscale, 1.0);
    // SAFETY: the page is as long as its layout says, the norm has one element; the kernels stay within the segments.
    unsafe {
        let norm = BufferArg::from_raw_parts(norm.clone(), 1);
        match tables {
            None => full_kernel::launch_unchecked(
                client,
                cubes,
                cube_dim,
                vector,
                member_args(members, vector),
                BufferArg::from_raw_parts(words.clone(), layout.words / vector),
                norm,
                scalars,
                count,
                rule,
            ),
            Some(tables) => block8_kernel::launch_unchecked(
                client,
                cubes,
                cube_dim,
                vector,
                member_args(members, vector),
                BufferArg::from_raw_parts(words.clone(), layout.words),
                norm,
                BufferArg::from_raw_parts(tables.clone(), TABLES),
                scalars,
                count,
                rule,
            ),
        }
    }
}

/// The launch's members as an argument; `N` is `vector`.
fn member_args<N: Size>(members: &[Member<'_>], vector: usize) -> SequenceArg<MemberArgs<N>> {
    let args = members.iter().map(|Member { segment, param, grad, .. }| {
        let end = (segment.start + segment.len) / vector;
        // SAFETY: the tensors were checked to have the parameter's length, of which the segment is a part.
        let buffer = |handle: &Handle| unsafe { BufferArg::from_raw_parts(handle.clone(), end) };
        MemberArgsLaunch::new(
            buffer(param),
            buffer(grad),
            segment.start as u32,
            segment.len as u32,
            segment.word as u32,
        )
    });
    args.collect()
}

/// A segment of the launch.
#[derive(CubeType, CubeLaunch)]
struct MemberArgs<N: Size> {
    param: Box<[Vector<f32, N>]>,
    grad: Box<[Vector<f32, N>]>,
    start: u32,
    len: u32,
    word: u32,
}

/// [`Scalars`].
#[derive(CubeType, CubeLaunch)]
struct ScalarArgs {
    beta1: f32,
    rest1: f32,
    beta2: f32,
    rest2: f32,
    step_size: f32,
    correction2: f32,
    eps: f32,
    keep: f32,
    max_norm: f32,
    unscale: f32,
    /// 1, unknown to the compiler: keeps each product's own rounding.
    one: f32,
}

/// Whether the norm is finite, by its bits: compilers may take for granted that floats are.
#[cube]
fn is_finite(norm: f32) -> bool {
    (u32::reinterpret(norm) & 0x7f80_0000u32) != 0x7f80_0000u32
}

/// `gradient_factor` of the oracle, for a norm that is finite.
#[cube]
fn gradient_factor(norm: f32, s: &ScalarArgs) -> f32 {
    let norm = norm * s.unscale * s.one;
    select(s.max_norm > 0.0f32, min(s.max_norm / (norm + 1e-6f32), 1.0f32), 1.0f32) * s.unscale
}

/// `adamw_element` of the oracle: `values` are p, g, m, v on entry, and p, g, the new m and v on return.
#[cube]
fn adamw_element(values: &mut Array<f32>, s: &ScalarArgs) {
    let g = values[1];
    let m = s.beta1 * values[2] * s.one + s.rest1 * g * s.one;
    let v = s.beta2 * values[3] * s.one + s.rest2 * (g * g) * s.one;
    let denominator = v.sqrt() / s.correction2 * s.one + s.eps;
    values[0] = values[0] * s.keep * s.one - s.step_size * (m / denominator) * s.one;
    values[2] = m;
    values[3] = v;
}

/// `lion_element` of the oracle; there is no v.
#[cube]
fn lion_element(values: &mut Array<f32>, s: &ScalarArgs) {
    let g = values[1];
    let m = values[2];
    let direction = s.beta1 * m * s.one + s.rest1 * g * s.one;
    let sign = select(direction > 0.0f32, 1.0f32, select(direction < 0.0f32, -1.0f32, 0.0f32));
    values[0] = values[0] * s.keep * s.one - s.step_size * sign * s.one;
    values[2] = s.beta2 * m * s.one + s.rest2 * g * s.one;
}

#[cube]
fn update_element(values: &mut Array<f32>, s: &ScalarArgs, #[comptime] rule: Rule) {
    match rule {
        Rule::AdamW => adamw_element(values, s),
        Rule::Lion => lion_element(values, s),
    }
}

/// The next multiple of [`WIDTH`], as `Segment::moment_words` has it.
#[cube]
fn rounded_up(words: usize) -> usize {
    (words + comptime!(WIDTH - 1)) / WIDTH * WIDTH
}

/// Reads [`WIDTH`] elements of parameter and gradient, zeros beyond the segment's end.
#[cube]
fn load<N: Size>(member: &MemberArgs<N>, first: usize, p: &mut Array<f32>, g: &mut Array<f32>) {
    let vector = N::value().comptime();
    #[unroll]
    for v in 0..comptime!(WIDTH / vector) {
        let at = first + v * vector;
        if at < member.len as usize {
            let at = (member.start as usize + at) / vector;
            let (param, grad) = (member.param[at], member.grad[at]);
            #[unroll]
            for i in 0..vector {
                p[v * vector + i] = param.extract(i);
                g[v * vector + i] = grad.extract(i);
            }
        }
    }
}

/// Writes them back.
#[cube]
fn store<N: Size>(member: &mut MemberArgs<N>, first: usize, p: &Array<f32>) {
    let vector = N::value().comptime();
    #[unroll]
    for v in 0..comptime!(WIDTH / vector) {
        let at = first + v * vector;
        if at < member.len as usize {
            let mut values = Vector::<f32, N>::empty();
            #[unroll]
            for i in 0..vector {
                values.insert(i, p[v * vector + i]);
            }
            member.param[(member.start as usize + at) / vector] = values;
        }
    }
}

#[cube(launch_unchecked)]
fn full_kernel<N: Size>(
    mut members: Sequence<MemberArgs<N>>,
    state: &mut [Vector<f32, N>],
    norm: &[f32],
    s: &ScalarArgs,
    #[comptime] count: usize,
    #[comptime] rule: Rule,
) {
    let vector = N::value().comptime();
    let first = CUBE_POS_X as usize * ROUND + UNIT_POS as usize * WIDTH;
    let factor = gradient_factor(norm[0], s);
    if is_finite(norm[0]) {
        #[unroll]
        for k in 0..count {
            if CUBE_POS_Y == k as u32 {
                let member = members.index(k);
                let mut p = Array::<f32>::new(WIDTH);
                let mut g = Array::<f32>::new(WIDTH);
                load::<N>(member, first, &mut p, &mut g);
                let len = member.len as usize;
                // The second moment comes behind the first.
                let second = rounded_up(len);
                #[unroll]
                for v in 0..comptime!(WIDTH / vector) {
                    let at = first + v * vector;
                    if at < len {
                        let m_at = (member.word as usize + at) / vector;
                        let v_at = (member.word as usize + second + at) / vector;
                        let mut new_m = state[m_at];
                        let mut new_v = Vector::<f32, N>::empty();
                        if comptime!(rule == Rule::AdamW) {
                            new_v = state[v_at];
                        }
                        #[unroll]
                        for i in 0..vector {
                            let mut values = Array::<f32>::new(4usize);
                            values[0] = p[v * vector + i];
                            values[1] = g[v * vector + i] * factor;
                            values[2] = new_m.extract(i);
                            if comptime!(rule == Rule::AdamW) {
                                values[3] = new_v.extract(i);
                            }
                            update_element(&mut values, s, rule);
                            p[v * vector + i] = values[0];
                            new_m.insert(i, values[2]);
                            if comptime!(rule == Rule::AdamW) {
                                new_v.insert(i, values[3]);
                            }
                        }
                        state[m_at] = new_m;
                        if comptime!(rule == Rule::AdamW) {
                            state[v_at] = new_v;
                        }
                    }
                }
                store::<N>(members.index_mut(k), first, &p);
            }
        }
    }
}

/// The code of `value` in the map whose thresholds begin at `thresholds`: eight halvings.
#[cube]
fn nearest(tables: &[f32], #[comptime] thresholds: usize, x: f32) -> u32 {
    let mut code = 0usize;
    #[unroll]
    for level in 0..8usize {
        let step = comptime!(128usize >> level);
        if x > tables[code + thresholds + step - 1] {
            code += step;
        }
    }
    code as u32
}

/// The larger of two magnitudes, of which none is NaN.
#[cube]
fn larger(a: f32, b: f32) -> f32 {
    select(a > b, a, b)
}

#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn block8_kernel<N: Size>(
    mut members: Sequence<MemberArgs<N>>,
    state: &mut [u32],
    norm: &[f32],
    tables: &[f32],
    s: &ScalarArgs,
    #[comptime] count: usize,
    #[comptime] rule: Rule,
) {
    let unit = UNIT_POS as usize;
    let adamw = comptime!(rule == Rule::AdamW);
    let mut maps = Shared::<[f32]>::new_slice(TABLES);
    #[unroll]
    for i in 0..comptime!(TABLES / UNITS) {
        maps[unit + i * UNITS] = tables[unit + i * UNITS];
    }
    let mut maxima = Shared::<[f32]>::new_slice(comptime!(2 * UNITS));
    sync_cube();

    let factor = gradient_factor(norm[0], s);
    let mut start_word = 0usize;
    let mut len = 0usize;
    #[unroll]
    for k in 0..count {
        if CUBE_POS_Y == k as u32 {
            let member = members.index(k);
            start_word = member.word as usize;
            len = member.len as usize;
        }
    }
    let code_words = rounded_up(rounded_up(len) / WIDTH);
    let absmax_word = start_word + code_words * comptime!(if rule == Rule::AdamW { 2usize } else { 1usize });
    let blocks = (len + comptime!(BLOCKSIZE - 1)) / BLOCKSIZE;

    // No barrier is inside a branch: units without elements go along with zeros.
    for round in 0..ROUNDS {
        let first = (CUBE_POS_X as usize * ROUNDS + round) * ROUND + unit * WIDTH;
        let mut p = Array::<f32>::new(WIDTH);
        let mut g = Array::<f32>::new(WIDTH);
        let mut m = Array::<f32>::new(WIDTH);
        let mut v = Array::<f32>::new(WIDTH);
        #[unroll]
        for i in 0..WIDTH {
            p[i] = 0.0f32;
            g[i] = 0.0f32;
            m[i] = 0.0f32;
            v[i] = 0.0f32;
        }
        #[unroll]
        for k in 0..count {
            if CUBE_POS_Y == k as u32 {
                load::<N>(members.index(k), first, &mut p, &mut g);
            }
        }
        let inside = first < len;
        let m_word = start_word + first / 4;
        let v_word = m_word + code_words;
        let m_absmax = absmax_word + first / BLOCKSIZE;
        let v_absmax = m_absmax + blocks;
        if inside {
            let codes = state[m_word];
            let absmax = f32::reinterpret(state[m_absmax]);
            #[unroll]
            for i in 0..WIDTH {
                // Codes behind the end are padding.
                if first + i < len {
                    let code = (codes >> comptime!(8 * i as u32)) & 255u32;
                    m[i] = maps[code as usize + SIGNED] * absmax;
                }
            }
            if adamw {
                let codes = state[v_word];
                let absmax = f32::reinterpret(state[v_absmax]);
                #[unroll]
                for i in 0..WIDTH {
                    if first + i < len {
                        let code = (codes >> comptime!(8 * i as u32)) & 255u32;
                        v[i] = maps[code as usize + UNSIGNED] * absmax;
                    }
                }
            }
        }

        let mut m_max = 0.0f32;
        let mut v_max = 0.0f32;
        #[unroll]
        for i in 0..WIDTH {
            let mut values = Array::<f32>::new(4usize);
            values[0] = p[i];
            values[1] = g[i] * factor;
            values[2] = m[i];
            values[3] = v[i];
            update_element(&mut values, s, rule);
            p[i] = values[0];
            m[i] = values[2];
            m_max = larger(m_max, m[i].abs());
            if adamw {
                v[i] = values[3];
                v_max = larger(v_max, v[i]);
            }
        }

        // A tree over the units of each block.
        maxima[unit] = m_max;
        maxima[unit + UNITS] = v_max;
        sync_cube();
        #[unroll]
        for level in 0..comptime!(UNITS_PER_BLOCK.ilog2()) {
            let stride = comptime!(UNITS_PER_BLOCK >> (level as usize + 1));
            if unit % UNITS_PER_BLOCK < stride {
                maxima[unit] = larger(maxima[unit], maxima[unit + stride]);
                if adamw {
                    maxima[unit + UNITS] = larger(maxima[unit + UNITS], maxima[unit + UNITS + stride]);
                }
            }
            sync_cube();
        }
        let leader = unit - unit % UNITS_PER_BLOCK;
        m_max = maxima[leader];
        v_max = maxima[leader + UNITS];
        // Everyone has read the maxima before the next round writes them.
        sync_cube();

        if inside && is_finite(norm[0]) {
            let m_absmax_new = select(m_max < f32::MIN_POSITIVE, 0.0f32, m_max);
            let mut word = 0u32;
            #[unroll]
            for i in 0..WIDTH {
                let x = select(m_absmax_new == 0.0f32, 0.0f32, m[i] / m_max);
                let code = nearest(&maps, comptime!(SIGNED + 256), x);
                // A negative value never becomes 0.
                let code = select(x < 0.0f32 && code == SIGNED_ZERO as u32, code - 1, code);
                word |= code << comptime!(8 * i as u32);
            }
            state[m_word] = word;
            if unit == leader {
                state[m_absmax] = u32::reinterpret(m_absmax_new);
            }
            if adamw {
                let v_absmax_new = select(v_max < f32::MIN_POSITIVE, 0.0f32, v_max);
                let mut word = 0u32;
                #[unroll]
                for i in 0..WIDTH {
                    let x = select(v_absmax_new == 0.0f32, 0.0f32, v[i] / v_max);
                    word |= nearest(&maps, comptime!(UNSIGNED + 256), x) << comptime!(8 * i as u32);
                }
                state[v_word] = word;
                if unit == leader {
                    state[v_absmax] = u32::reinterpret(v_absmax_new);
                }
            }
            #[unroll]
            for k in 0..count {
                if CUBE_POS_Y == k as u32 {
                    store::<N>(members.index_mut(k), first, &p);
                }
            }
        }
    }
}
