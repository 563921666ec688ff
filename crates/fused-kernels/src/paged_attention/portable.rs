//! The launch of the kernels that run wherever CubeCL does.

use cubecl::CubeDim;

use super::kernel::{self, Plan, SPLIT};
use super::{Call, OPERATION, Shape, buffer, check_limit, check_reach};
use crate::KernelError;
use crate::elementwise::{UNITS, cube_count};

/// One launch, or two where positions are split among cubes. `division` says whether they are, and how many tokens share a
/// cube.
pub(super) fn attend(call: &Call<'_>, division: Option<(bool, usize)>) -> Result<(), KernelError> {
    let &Call { client, batch, shape, .. } = call;
    let plan = Plan::new(client, batch, shape);
    if !plan.has_columns() {
        let reason = format!("head_dim is {}: no multiple of 4, and more than {UNITS}", shape.head_dim);
        return Err(KernelError::Shape { operation: OPERATION, reason });
    }
    let Some((splits_apart, tokens)) = division else {
        return launch(call, plan, plan.splits_among_cubes(batch, shape));
    };
    let plan = plan.with_tokens(tokens);
    if tokens == 0 || !plan.fits(client) {
        let reason = "as many as shared memory holds the queries of, and at least one";
        return Err(KernelError::Attention { name: "tokens of a cube", value: tokens.to_string(), reason });
    }
    launch(call, plan, splits_apart)
}

fn launch(call: &Call<'_>, plan: Plan, split: bool) -> Result<(), KernelError> {
    let &Call { client, buffers, batch, shape, options } = call;
    let &Shape { heads, kv_heads, head_dim, slots, format } = shape;
    check_reach(batch, slots)?;
    let argument = |name, handle, tokens: usize, heads: usize, vector| {
        buffer(name, handle, tokens.saturating_mul(heads * head_dim), format.size(), vector)
    };
    let tokens = batch.tokens();
    let (wide, narrow) = plan.vectors();
    let q = argument("q", buffers.q, tokens, heads, 1)?;
    let out = || argument("out", buffers.out, tokens, heads, 1);
    let keys = argument("keys", buffers.keys, slots, kv_heads, wide)?;
    let values = argument("values", buffers.values, slots, kv_heads, narrow)?;
    let words = || buffer("words", buffers.words, batch.num_words(), 4, 1);
    if tokens == 0 {
        return Ok(());
    }
    let splits = if split { batch.max_len().div_ceil(SPLIT) } else { 1 };
    let cubes = plan.cubes(batch, shape).saturating_mul(splits);
    check_limit("cubes", cubes, i32::MAX as usize)?;
    let partial_len = if split { splits.saturating_mul(tokens * heads * (head_dim + 2)) } else { 1 };
    let partial_handle = client.empty(4 * partial_len);
    let partial = || buffer("partial", &partial_handle, partial_len, 4, 1);
    let has_sinks = buffers.sinks.is_some();
    let work = plan.work(batch, shape, options, splits, split, has_sinks);
    // SAFETY: the buffers' sizes are checked; tables and slots stay below `reach`, which is within the cache, and the
    // kernel stays within the batch's tokens and lengths.
    unsafe {
        kernel::attention::launch_unchecked(
            client,
            cube_count(client, cubes),
            CubeDim::new_1d(UNITS as u32),
            wide,
            narrow,
            q,
            keys,
            values,
            words()?,
            call.sinks()?,
            out()?,
            partial()?,
            work,
            format.elem_type(),
        );
        if split {
            kernel::join::launch_unchecked(
                client,
                cube_count(client, (tokens * heads * head_dim).div_ceil(UNITS)),
                CubeDim::new_1d(UNITS as u32),
                partial()?,
                words()?,
                call.sinks()?,
                out()?,
                plan.work(batch, shape, options, splits, split, has_sinks),
                format.elem_type(),
            );
        }
    }
    Ok(())
}
