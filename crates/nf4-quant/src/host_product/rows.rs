//! Products of some rows with all tokens.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::Range;

use super::lanes::{Codes, GROUP, Group, Halves, Lanes, Portable};
#[cfg(target_arch = "x86_64")]
use super::x86::{Avx2, Avx512};
use super::{PANEL, Processor, WeightView, place};
use crate::{Element, FloatFormat};

/// Where weights come from.
#[derive(Clone, Copy)]
pub(super) enum Source<'a, E> {
    Codes(&'a WeightView<'a>),
    /// `[out_features, in_features]`.
    Dense(&'a [E]),
}

/// Rows of a weight, and the tokens that they are multiplied with.
pub(super) struct Task<'a, E> {
    pub(super) source: Source<'a, E>,
    /// `[tokens, groups]`, in the order that the source has within a group.
    pub(super) x: &'a [Group],
    /// Groups of a row.
    pub(super) groups: usize,
    /// Elements of a row.
    pub(super) columns: usize,
    pub(super) tokens: usize,
    pub(super) rows: Range<usize>,
}

impl<'a, E> Task<'a, E> {
    fn token(&self, token: usize) -> &'a [Group] {
        &self.x[token * self.groups..][..self.groups]
    }
}

/// Memory that a thread uses again.
#[derive(Default)]
pub(super) struct Scratch {
    absmax: Vec<f32>,
    panel: Vec<Group>,
}

thread_local! {
    /// At most some rows' worth; nothing in it outlives a task.
    pub(super) static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// The panel's memory.
fn panel_of(panel: &mut Vec<Group>, groups: usize) -> &mut [Group] {
    if panel.len() < PANEL * groups {
        panel.resize(PANEL * groups, [0.0; GROUP]);
    }
    panel
}

/// A matrix whose columns different threads write.
#[derive(Clone, Copy)]
pub(super) struct Columns<'a> {
    start: *mut f32,
    len: usize,
    /// From one row to the next.
    stride: usize,
    borrow: PhantomData<&'a mut [f32]>,
}

// SAFETY: a matrix of floats may be written from any thread; `set` makes its callers keep to different columns.
unsafe impl Send for Columns<'_> {}
// SAFETY: as above.
unsafe impl Sync for Columns<'_> {}

impl<'a> Columns<'a> {
    pub(super) fn new(matrix: &'a mut [f32], stride: usize) -> Self {
        Self { start: matrix.as_mut_ptr(), len: matrix.len(), stride, borrow: PhantomData }
    }

    /// # Safety
    ///
    /// No other thread may write this column meanwhile.
    #[inline(always)]
    unsafe fn set(self, row: usize, column: usize, value: f32) {
        let i = row * self.stride + column;
        assert!(column < self.stride && i < self.len);
        // SAFETY: `i` is within the slice that `new` borrowed, and no one else is at this column.
        unsafe { *self.start.add(i) = value };
    }
}

/// A task's products.
///
/// # Safety
///
/// The processor must be this machine's, and no other thread may write the task's columns of the result meanwhile.
pub(super) unsafe fn run<E: Element>(processor: Processor, task: &Task<'_, E>, scratch: &mut Scratch, y: Columns<'_>) {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
        unsafe fn avx512<E: Element>(task: &Task<'_, E>, scratch: &mut Scratch, y: Columns<'_>) {
            // SAFETY: as the caller's.
            unsafe { rows::<Avx512, E, 2, 4>(task, scratch, y) }
        }
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn avx2<E: Element>(task: &Task<'_, E>, scratch: &mut Scratch, y: Columns<'_>) {
            // SAFETY: as the caller's.
            unsafe { rows::<Avx2, E, 2, 2>(task, scratch, y) }
        }
        match processor {
            // SAFETY: as the caller's.
            Processor::Avx512 => return unsafe { avx512(task, scratch, y) },
            // SAFETY: as the caller's.
            Processor::Avx2 => return unsafe { avx2(task, scratch, y) },
            Processor::Portable => {}
        }
    }
    // SAFETY: as the caller's; the instructions are those that the program is compiled for.
    unsafe { rows::<Portable, E, 2, 2>(task, scratch, y) }
}

/// Blocks of a task's rows.
struct Blocks<'a> {
    weight: &'a WeightView<'a>,
    codebook: &'static [f32; 16],
    /// The absmax of each block, from block `first` on.
    absmax: &'a [f32],
    first: usize,
    /// A group's number shifted by it is its block's, where rows are whole groups.
    shift: u32,
}

impl<'a> Blocks<'a> {
    fn new(weight: &'a WeightView<'a>, rows: &Range<usize>, absmax: &'a mut Vec<f32>) -> Self {
        let (columns, blocksize) = (weight.in_features, weight.blocksize);
        let elements = rows.start * columns..rows.end * columns;
        let first = elements.start / blocksize;
        absmax.resize((elements.end - 1) / blocksize + 1 - first, 0.0);
        weight.absmax.read(first, absmax);
        let shift = blocksize.trailing_zeros() - GROUP.trailing_zeros();
        Self { weight, codebook: weight.quant_type.codebook(), absmax, first, shift }
    }

    /// The codes of a row of whole groups.
    #[inline(always)]
    fn codes(&self, row: usize, groups: usize) -> &'a [Codes] {
        let (codes, _) = self.weight.codes.as_chunks::<{ GROUP / 2 }>();
        &codes[row * groups..][..groups]
    }

    /// Whether two groups beside each other, the first of an even number, are of one block in every row.
    #[inline(always)]
    fn are_paired(&self, groups: usize) -> bool {
        self.shift > 0 && groups.is_multiple_of(2)
    }

    /// The absmax of a group, counted from the weight's first.
    #[inline(always)]
    fn absmax_of(&self, group: usize) -> f32 {
        self.absmax[(group >> self.shift) - self.first]
    }

    /// A block's values, rounded to `E`.
    ///
    /// # Safety
    ///
    /// As of [`Lanes`].
    #[inline(always)]
    unsafe fn table<L: Lanes, E: Element>(&self, base: L::Table, absmax: f32) -> L::Table {
        if E::FORMAT == FloatFormat::F32 {
            // SAFETY: as the caller's.
            return unsafe { L::scaled(base, absmax) };
        }
        // Loops, because `map` would not be compiled for the processor.
        let mut values = *self.codebook;
        for value in &mut values {
            *value = E::from_f32(*value * absmax).to_f32();
        }
        // SAFETY: as the caller's.
        unsafe { L::table(&values) }
    }
}

/// Up to `ROWS` rows and `TOKENS` tokens at a time: as many sums as fit the registers.
#[inline(always)]
unsafe fn rows<L: Lanes, E: Element, const ROWS: usize, const TOKENS: usize>(
    task: &Task<'_, E>,
    scratch: &mut Scratch,
    y: Columns<'_>,
) {
    let (columns, whole) = (task.columns, task.columns.is_multiple_of(GROUP));
    let panels = task.rows.clone().step_by(PANEL).map(|start| start..task.rows.end.min(start + PANEL));
    match task.source {
        Source::Codes(weight) => {
            let blocks = Blocks::new(weight, &task.rows, &mut scratch.absmax);
            if whole && task.tokens <= TOKENS {
                // A loop, because a closure would not be compiled for the processor.
                for row in task.rows.clone() {
                    // SAFETY: as the caller's.
                    unsafe { from_codes::<L, E>(task, &blocks, row, y) };
                }
                return;
            }
            let memory = panel_of(&mut scratch.panel, task.groups);
            for rows in panels {
                for (row, panel) in rows.clone().zip(memory.chunks_exact_mut(task.groups)) {
                    match whole {
                        // SAFETY: as the caller's.
                        true => unsafe { dequantize::<L, E>(&blocks, row, panel) },
                        false => spell::<E>(&blocks, row, panel),
                    }
                }
                // SAFETY: as the caller's.
                unsafe { panel::<L, E, ROWS, TOKENS>(task, memory, rows, y) };
            }
        }
        Source::Dense(weight) => {
            let in_place = E::as_f32(weight).filter(|_| whole).map(|weight| weight.as_chunks::<GROUP>().0);
            let halves = E::as_bf16(weight).filter(|_| whole && task.tokens <= TOKENS);
            for rows in panels {
                if let Some(halves) = halves {
                    let (groups, _) = halves.as_chunks::<GROUP>();
                    for row in rows {
                        // SAFETY: as the caller's.
                        unsafe { from_halves::<L, E>(task, &groups[row * task.groups..], row, y) };
                    }
                    continue;
                }
                if let Some(groups) = in_place {
                    // SAFETY: as the caller's.
                    unsafe { panel::<L, E, ROWS, TOKENS>(task, &groups[rows.start * task.groups..], rows, y) };
                    continue;
                }
                let memory = panel_of(&mut scratch.panel, task.groups);
                for (row, panel) in rows.clone().zip(memory.chunks_exact_mut(task.groups)) {
                    panel[task.groups - 1] = [0.0; GROUP];
                    E::widen(&weight[row * columns..][..columns], &mut panel.as_flattened_mut()[..columns]);
                }
                // SAFETY: as the caller's.
                unsafe { panel::<L, E, ROWS, TOKENS>(task, memory, rows, y) };
            }
        }
    }
}

/// Some rows, whose weights are in a panel, with all tokens.
#[inline(always)]
unsafe fn panel<L: Lanes, E: Element, const ROWS: usize, const TOKENS: usize>(
    task: &Task<'_, E>,
    panel: &[Group],
    rows: Range<usize>,
    y: Columns<'_>,
) {
    let of_row = |row: usize| &panel[(row - rows.start) * task.groups..];
    for token in (0..task.tokens).step_by(TOKENS) {
        let tokens = [token, TOKENS.min(task.tokens - token)];
        let mut row = rows.start;
        // The first tokens bring a dense weight from memory, which is fastest in order.
        while token > 0 && row + ROWS <= rows.end {
            // SAFETY: as the caller's.
            unsafe { from_panel::<L, E, ROWS>(task, of_row(row), tokens, row, y) };
            row += ROWS;
        }
        for row in row..rows.end {
            // SAFETY: as the caller's.
            unsafe { from_panel::<L, E, 1>(task, of_row(row), tokens, row, y) };
        }
    }
}

/// Dequantizes a row of whole groups.
#[inline(always)]
unsafe fn dequantize<L: Lanes, E: Element>(blocks: &Blocks<'_>, row: usize, panel: &mut [Group]) {
    let (codes, start) = (blocks.codes(row, panel.len()), row * panel.len());
    // SAFETY: as the caller's.
    unsafe {
        let base = L::table(blocks.codebook);
        for (i, (codes, group)) in codes.iter().zip(panel).enumerate() {
            let table = blocks.table::<L, E>(base, blocks.absmax_of(start + i));
            L::store(L::decode(codes, table), group);
        }
    }
}

/// Dequantizes a row of any length, one element after the other.
fn spell<E: Element>(blocks: &Blocks<'_>, row: usize, panel: &mut [Group]) {
    let columns = blocks.weight.in_features;
    panel[columns / GROUP] = [0.0; GROUP];
    for column in 0..columns {
        let element = row * columns + column;
        let byte = blocks.weight.codes[element / 2];
        let code = if element.is_multiple_of(2) { byte >> 4 } else { byte & 15 };
        let absmax = blocks.absmax[element / blocks.weight.blocksize - blocks.first];
        let value = blocks.codebook[usize::from(code)] * absmax;
        panel[column / GROUP][place(column % GROUP)] = E::from_f32(value).to_f32();
    }
}

/// A row of whole groups with all tokens, which are at most four.
#[inline(always)]
unsafe fn from_codes<L: Lanes, E: Element>(task: &Task<'_, E>, blocks: &Blocks<'_>, row: usize, y: Columns<'_>) {
    // SAFETY: as the caller's.
    unsafe {
        match task.tokens {
            4 => tokens_from_codes::<L, E, 4>(task, blocks, row, y),
            3 => tokens_from_codes::<L, E, 3>(task, blocks, row, y),
            2 => tokens_from_codes::<L, E, 2>(task, blocks, row, y),
            1 => tokens_from_codes::<L, E, 1>(task, blocks, row, y),
            _ => {}
        }
    }
}

#[inline(always)]
unsafe fn tokens_from_codes<L: Lanes, E: Element, const TOKENS: usize>(
    task: &Task<'_, E>,
    blocks: &Blocks<'_>,
    row: usize,
    y: Columns<'_>,
) {
    let (codes, start) = (blocks.codes(row, task.groups), row * task.groups);
    let x: [&[Group]; TOKENS] = std::array::from_fn(|token| task.token(token));
    // SAFETY: as the caller's.
    unsafe {
        let base = L::table(blocks.codebook);
        let mut sums = [[L::zero(); TOKENS]; 1];
        if blocks.are_paired(task.groups) {
            let x = x.map(|x| x.as_chunks::<2>().0);
            for (i, codes) in codes.as_chunks::<2>().0.iter().enumerate() {
                let table = blocks.table::<L, E>(base, blocks.absmax_of(start + 2 * i));
                for half in 0..2 {
                    let weights = L::decode(&codes[half], table);
                    for t in 0..TOKENS {
                        sums[0][t] = L::add(sums[0][t], weights, &x[t][i][half]);
                    }
                }
            }
        } else {
            for (i, codes) in codes.iter().enumerate() {
                let weights = L::decode(codes, blocks.table::<L, E>(base, blocks.absmax_of(start + i)));
                for t in 0..TOKENS {
                    sums[0][t] = L::add(sums[0][t], weights, &x[t][i]);
                }
            }
        }
        set::<L, 1, TOKENS>(sums, row, 0, y);
    }
}

/// A row of whole groups in bf16 with all tokens, which are at most four.
#[inline(always)]
unsafe fn from_halves<L: Lanes, E: Element>(task: &Task<'_, E>, weights: &[Halves], row: usize, y: Columns<'_>) {
    // SAFETY: as the caller's.
    unsafe {
        match task.tokens {
            4 => tokens_from_halves::<L, E, 4>(task, weights, row, y),
            3 => tokens_from_halves::<L, E, 3>(task, weights, row, y),
            2 => tokens_from_halves::<L, E, 2>(task, weights, row, y),
            1 => tokens_from_halves::<L, E, 1>(task, weights, row, y),
            _ => {}
        }
    }
}

#[inline(always)]
unsafe fn tokens_from_halves<L: Lanes, E: Element, const TOKENS: usize>(
    task: &Task<'_, E>,
    weights: &[Halves],
    row: usize,
    y: Columns<'_>,
) {
    let x: [&[Group]; TOKENS] = std::array::from_fn(|token| task.token(token));
    // SAFETY: as the caller's.
    unsafe {
        let mut sums = [[L::zero(); TOKENS]; 1];
        for (i, halves) in weights[..task.groups].iter().enumerate() {
            let weights = L::widen(halves);
            for t in 0..TOKENS {
                sums[0][t] = L::add(sums[0][t], weights, &x[t][i]);
            }
        }
        set::<L, 1, TOKENS>(sums, row, 0, y);
    }
}

/// `ROWS` dequantized rows with some tokens, at most four.
#[inline(always)]
unsafe fn from_panel<L: Lanes, E: Element, const ROWS: usize>(
    task: &Task<'_, E>,
    panel: &[Group],
    [token, tokens]: [usize; 2],
    row: usize,
    y: Columns<'_>,
) {
    // SAFETY: as the caller's.
    unsafe {
        match tokens {
            4 => tokens_from_panel::<L, E, ROWS, 4>(task, panel, token, row, y),
            3 => tokens_from_panel::<L, E, ROWS, 3>(task, panel, token, row, y),
            2 => tokens_from_panel::<L, E, ROWS, 2>(task, panel, token, row, y),
            1 => tokens_from_panel::<L, E, ROWS, 1>(task, panel, token, row, y),
            _ => {}
        }
    }
}

#[inline(always)]
unsafe fn tokens_from_panel<L: Lanes, E: Element, const ROWS: usize, const TOKENS: usize>(
    task: &Task<'_, E>,
    panel: &[Group],
    token: usize,
    row: usize,
    y: Columns<'_>,
) {
    let groups = task.groups;
    let rows: [&[Group]; ROWS] = std::array::from_fn(|r| &panel[r * groups..][..groups]);
    let x: [&[Group]; TOKENS] = std::array::from_fn(|t| task.token(token + t));
    // SAFETY: as the caller's.
    unsafe {
        let mut sums = [[L::zero(); TOKENS]; ROWS];
        for i in 0..groups {
            for r in 0..ROWS {
                let weights = L::load(&rows[r][i]);
                for t in 0..TOKENS {
                    sums[r][t] = L::add(sums[r][t], weights, &x[t][i]);
                }
            }
        }
        set::<L, ROWS, TOKENS>(sums, row, token, y);
    }
}

/// Writes what was summed.
#[inline(always)]
unsafe fn set<L: Lanes, const ROWS: usize, const TOKENS: usize>(
    sums: [[L::Sum; TOKENS]; ROWS],
    row: usize,
    token: usize,
    y: Columns<'_>,
) {
    for (r, sums) in sums.into_iter().enumerate() {
        for (t, sum) in sums.into_iter().enumerate() {
            // SAFETY: as the caller's.
            unsafe { y.set(token + t, row + r, L::total(sum)) };
        }
    }
}
