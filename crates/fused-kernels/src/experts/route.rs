//! Each token's experts, and the rows sorted by expert: three launches.
//!
//! - A cube takes a token. Each of its units counts the experts that are ahead of its own, by score and of equal scores by
//!   number: those with fewer than `per_token` ahead are chosen, and the count is their place.
//! - A cube takes an expert, and each of its units a run of entries: it counts those of the expert and those of the
//!   experts before. Sums over the units say where the expert's rows begin, and where each unit's do.
//! - One cube lists the tiles.
//!
//! With 2,048 tokens that go to 8 of 128 experts: 34 million comparisons, and 16 MB out of the second-level cache.

use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;

use super::{Places, Routing};
use crate::KernelError;
use crate::elementwise::{UNITS, buffer, cube_count};

/// Writes the words of a routing by the highest scores.
///
/// Scores are compared as `f32::total_cmp` does, so that ones that are no numbers choose something.
///
/// # Shapes
/// `scores` is f32 `[tokens, experts]`, `words` u32 `[Routing::words]`.
///
/// # Errors
/// The variants about sizes when a buffer does not hold its shape.
pub fn route(client: &Client, scores: &Handle, words: &Handle, routing: &Routing) -> Result<(), KernelError> {
    let scores = buffer("scores", scores, routing.tokens * routing.experts, 4, 1)?;
    let all_words = || routing.words_argument(words);
    all_words()?;
    let units = routing.experts.next_power_of_two().clamp(32, UNITS);
    // SAFETY: the buffers' sizes are checked. Units stay within tokens, rows, experts and tiles; what is read from the words
    // was written by the launch before.
    unsafe {
        if routing.tokens > 0 {
            let cubes = cube_count(client, routing.tokens);
            let dim = CubeDim::new_1d(units as u32);
            choose_kernel::launch_unchecked(client, cubes, dim, scores, all_words()?, routing.launch(), units);
        }
        let dim = CubeDim::new_1d(UNITS as u32);
        sort_kernel::launch_unchecked(client, cube_count(client, routing.experts), dim, all_words()?, routing.launch());
        tiles_kernel::launch_unchecked(client, CubeCount::Static(1, 1, 1), dim, all_words()?, routing.launch());
    }
    Ok(())
}

/// A number that is larger for a larger float, in the order of `f32::total_cmp`.
#[cube]
fn order(score: f32) -> u32 {
    let bits = u32::reinterpret(score);
    select(bits >> 31u32 == 1u32, bits ^ 0xFFFF_FFFFu32, bits | 0x8000_0000u32)
}

#[cube(launch_unchecked)]
fn choose_kernel(scores: &[f32], words: &mut [u32], places: &Places, #[comptime] units: usize) {
    let (experts, per_token) = (comptime!(places.experts), comptime!(places.per_token));
    let mut keys = Shared::<[u32]>::new_slice(experts);
    let token = CUBE_POS;
    let present = token < places.tokens;
    let mut own = UNIT_POS as usize;
    while own < experts {
        if present {
            keys[own] = order(scores[token * experts + own]);
        }
        own += units;
    }
    sync_cube();
    if present {
        let mut own = UNIT_POS as usize;
        while own < experts {
            let key = keys[own];
            let mut ahead = 0usize;
            for other in 0..experts {
                let theirs = keys[other];
                if theirs > key || (theirs == key && other < own) {
                    ahead += 1;
                }
            }
            if ahead < per_token {
                words[token * per_token + ahead] = own as u32;
            }
            own += units;
        }
    }
}

/// Sums over the units before and of a unit itself, of two values.
#[cube]
fn inclusive_sums(values: &mut Shared<[u32]>, others: &mut Shared<[u32]>) {
    let unit = UNIT_POS as usize;
    sync_cube();
    #[unroll]
    for round in 0..comptime!(UNITS.ilog2() as usize) {
        let step = comptime!(1usize << round);
        let mut value = 0u32;
        let mut other = 0u32;
        if unit >= step {
            value = values[unit - step];
            other = others[unit - step];
        }
        sync_cube();
        values[unit] += value;
        others[unit] += other;
        sync_cube();
    }
}

#[cube(launch_unchecked)]
fn sort_kernel(words: &mut [u32], places: &Places) {
    let experts = comptime!(places.experts);
    let mut counts = Shared::<[u32]>::new_slice(UNITS);
    let mut before = Shared::<[u32]>::new_slice(UNITS);
    let unit = UNIT_POS as usize;
    let expert = CUBE_POS as u32;
    let run = (places.rows + comptime!(UNITS - 1)) / UNITS;
    let first = min(unit * run, places.rows);
    let end = min(first + run, places.rows);
    let mut own = 0u32;
    let mut others = 0u32;
    let mut entry = first;
    while entry < end {
        let chosen = words[entry];
        if chosen == expert {
            own += 1u32;
        }
        if chosen < expert {
            others += 1u32;
        }
        entry += 1;
    }
    counts[unit] = own;
    before[unit] = others;
    inclusive_sums(&mut counts, &mut before);
    let start = before[comptime!(UNITS - 1)];
    let mut row = start + counts[unit] - own;
    for entry in first..end {
        if words[entry] == expert {
            words[places.slots + entry] = row;
            words[places.entries + row as usize] = entry as u32;
            row += 1u32;
        }
    }
    if unit == 0 && CUBE_POS < experts {
        words[places.offsets + CUBE_POS] = start;
        if CUBE_POS + 1 == experts {
            words[places.offsets + experts] = start + counts[comptime!(UNITS - 1)];
        }
    }
}

/// Tiles of rows from `first` to `end`.
#[cube]
fn tiles_between(first: u32, end: u32, places: &Places) -> u32 {
    let (rows, tile_rows) = (end - first, places.tile_rows as u32);
    let full = rows / tile_rows;
    full + select(full * tile_rows < rows, 1u32, 0u32)
}

#[cube(launch_unchecked)]
fn tiles_kernel(words: &mut [u32], places: &Places) {
    let experts = comptime!(places.experts);
    let run = comptime!(places.experts.div_ceil(UNITS));
    let mut counts = Shared::<[u32]>::new_slice(UNITS);
    let mut unused = Shared::<[u32]>::new_slice(UNITS);
    let unit = UNIT_POS as usize;
    let mut own = 0u32;
    for i in 0..run {
        let expert = unit * run + i;
        if expert < experts {
            let at = places.offsets + expert;
            own += tiles_between(words[at], words[at + 1], places);
        }
    }
    counts[unit] = own;
    unused[unit] = 0u32;
    inclusive_sums(&mut counts, &mut unused);
    let mut tile = (counts[unit] - own) as usize;
    let total = counts[comptime!(UNITS - 1)] as usize;
    for i in 0..run {
        let expert = unit * run + i;
        if expert < experts {
            let at = places.offsets + expert;
            let end = words[at + 1];
            let mut first = words[at];
            while first < end {
                let place = places.tiles + 3 * tile;
                words[place] = expert as u32;
                words[place + 1] = first;
                first = min(first + places.tile_rows as u32, end);
                words[place + 2] = first;
                tile += 1;
            }
        }
    }
    let mut tile = total + unit;
    while tile < places.tile_count {
        let place = places.tiles + 3 * tile;
        words[place] = 0u32;
        words[place + 1] = 0u32;
        words[place + 2] = 0u32;
        tile += UNITS;
    }
}
