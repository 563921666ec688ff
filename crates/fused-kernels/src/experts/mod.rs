//! A mixture of experts around its products: which experts a token has, the rows sorted by expert, and what becomes of them
//! (Shazeer et al., 2017, arXiv 1701.06538).
//!
//! Every token goes to `per_token` experts, so there are `tokens * per_token` rows. Nothing here is read back to the host:
//! whoever launches knows how many rows there are, and which expert has which is in a buffer of words, [`Routing`].
//!
//! | call | |
//! |---|---|
//! | [`route()`] | each token's experts; the rows sorted by expert; the tiles that products take |
//! | [`weights()`], [`weight_gradient()`] | the router's weights of the chosen experts, and the gradient of its scores |
//! | [`gather()`] | a token's row for each of its experts |
//! | [`combine()`] | the (weighted) sum of a token's rows |
//! | [`gated()`] | the gated activation, of projections that have biases |
//! | [`gated_backward()`] | the gated activation's gradients, and those of the weights |
//! | [`gradient()`] | the gradients of the low-rank factors of all experts |
//!
//! Rows are put back by gathering: a token reads its rows, in the order of its experts. No sum depends on the order in which
//! units run, so that the same input gives the same bits.
//!
//! # The words
//!
//! A row's *entry* is `token * per_token + place`, where the token's likeliest expert has place 0. Words are u32:
//!
//! | part | elements | |
//! |---|---|---|
//! | `chosen` | rows | the expert of each entry |
//! | `slots` | rows | the row of each entry |
//! | `entries` | rows | the entry of each row |
//! | `offsets` | experts + 1 | each expert's first row, and the number of rows |
//! | `tiles` | 3 × tiles | expert, first row, end; zeros behind the last |
//!
//! An expert's rows are in the order of their entries.

mod gated;
mod gradient;
pub mod oracle;
mod route;
mod rows;
mod weights;

use std::ops::Range;

use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;
use cuda_source::FloatFormat;

use crate::KernelError;
use crate::elementwise::{buffer, vector_size};

pub use gated::{Biased, Gated, GatedBackward, gated, gated_backward};
pub use gradient::{FactorGradient, gradient};
pub use route::route;
pub use rows::{Combine, combine, gather};
pub use weights::{WeightGradient, weight_gradient, weights};

const OPERATION: &str = "experts";

/// The numbers that say how rows are routed, and where the words are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Routing {
    tokens: usize,
    experts: usize,
    per_token: usize,
    tile_rows: usize,
}

impl Routing {
    /// `tile_rows` is the most rows of a tile.
    ///
    /// # Errors
    /// [`KernelError::Shape`] when a token has no expert, or more than there are.
    pub fn new(tokens: usize, experts: usize, per_token: usize, tile_rows: usize) -> Result<Self, KernelError> {
        let fits = (1..=experts).contains(&per_token) && tile_rows > 0;
        if !fits || tokens.saturating_mul(per_token) > i32::MAX as usize {
            let reason = format!("{tokens} tokens of {per_token} experts each, of {experts}, in tiles of {tile_rows}");
            return Err(KernelError::Shape { operation: OPERATION, reason });
        }
        Ok(Self { tokens, experts, per_token, tile_rows })
    }

    /// Tokens.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Experts.
    pub fn experts(&self) -> usize {
        self.experts
    }

    /// Experts of a token.
    pub fn per_token(&self) -> usize {
        self.per_token
    }

    /// The most rows of a tile.
    pub fn tile_rows(&self) -> usize {
        self.tile_rows
    }

    /// Rows of all experts.
    pub fn rows(&self) -> usize {
        self.tokens * self.per_token
    }

    /// Tiles in the table: each expert that has rows fills all of its tiles but one.
    pub fn tile_count(&self) -> usize {
        self.rows() / self.tile_rows + self.experts.min(self.rows())
    }

    /// The part `chosen` of the words.
    pub fn chosen(&self) -> Range<usize> {
        0..self.rows()
    }

    /// The part `slots` of the words.
    pub fn slots(&self) -> Range<usize> {
        self.rows()..2 * self.rows()
    }

    /// The part `entries` of the words.
    pub fn entries(&self) -> Range<usize> {
        2 * self.rows()..3 * self.rows()
    }

    /// The part `offsets` of the words.
    pub fn offsets(&self) -> Range<usize> {
        let start = self.entries().end;
        start..start + self.experts + 1
    }

    /// The part `tiles` of the words.
    pub fn tiles(&self) -> Range<usize> {
        let start = self.offsets().end;
        start..start + 3 * self.tile_count()
    }

    /// Number of words.
    pub fn words(&self) -> usize {
        self.tiles().end
    }

    fn launch(&self) -> PlacesLaunch {
        PlacesLaunch::new(
            self.tokens,
            self.rows(),
            self.slots().start,
            self.entries().start,
            self.offsets().start,
            self.tiles().start,
            self.tile_count(),
            self.tile_rows,
            self.experts,
            self.per_token,
        )
    }

    fn words_argument(&self, words: &Handle) -> Result<BufferArg, KernelError> {
        buffer("words", words, self.words(), 4, 1)
    }
}

/// A [`Routing`] as kernels know it.
#[derive(CubeType, CubeLaunch)]
struct Places {
    tokens: usize,
    rows: usize,
    slots: usize,
    entries: usize,
    offsets: usize,
    tiles: usize,
    tile_count: usize,
    tile_rows: usize,
    #[cube(comptime)]
    experts: usize,
    #[cube(comptime)]
    per_token: usize,
}

/// The vector width of matrices of `width` columns, and a matrix as an argument.
fn matrices(
    client: &Client,
    format: FloatFormat,
    width: usize,
) -> (usize, impl Fn(&'static str, &Handle, usize) -> Result<BufferArg, KernelError>) {
    let vector = vector_size(client, format, &[width]);
    let argument = move |name, handle: &Handle, rows: usize| {
        buffer(name, handle, rows.saturating_mul(width), format.size(), vector)
    };
    (vector, argument)
}
