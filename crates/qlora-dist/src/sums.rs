//! Sums in an order that does not depend on who has what.
//!
//! One process that adds k vectors computes `((v0 + v1) + v2) + ...` for each element. Here rank 0 does so with what all
//! ranks send, piece by piece: a rank sends a piece of each of its parts, and the next one before it waits for the sum of
//! the first, so that rank 0 always has something to add.

use crate::error::DistError;
use crate::group::Group;
use crate::link::Shared;
use crate::wire::Call;

/// Elements of a piece: 4 MiB of each part.
const PIECE: usize = 1 << 20;

/// The sum of the parts of all ranks.
pub(crate) fn sum(
    group: &Group,
    shared: &Shared,
    call: Call,
    parts: &[(usize, &[f32])],
    len: usize,
) -> Result<Vec<f32>, DistError> {
    if let Some((number, part)) = parts.iter().find(|(_, part)| part.len() != len) {
        let problem = format!("part {number} has {} elements instead of {len}", part.len());
        return Err(group.unreadable(group.rank(), &problem));
    }
    let pieces: Vec<_> = (0..len).step_by(PIECE).map(|start| start..(start + PIECE).min(len)).collect();
    let numbers = parts.iter().map(|(number, _)| *number as u64);
    let head: Vec<u8> = std::iter::once(len as u64).chain(numbers).flat_map(u64::to_le_bytes).collect();
    let mut total = Vec::with_capacity(len);
    if group.rank() > 0 {
        shared.send(0, call, &head)?;
        let send = |piece: &std::ops::Range<usize>| {
            let mut bytes = Vec::with_capacity(parts.len() * piece.len() * 4);
            parts.iter().for_each(|(_, part)| append(&mut bytes, &part[piece.clone()]));
            shared.send(0, call, &bytes)
        };
        if let Some(first) = pieces.first() {
            send(first)?;
        }
        for (index, piece) in pieces.iter().enumerate() {
            if let Some(next) = pieces.get(index + 1) {
                send(next)?;
            }
            let bytes = shared.receive(0, call)?;
            let sum = floats(&bytes, piece.len()).ok_or_else(|| group.unreadable(0, "a sum has another length"))?;
            total.extend(sum);
        }
        return Ok(total);
    }
    let order = order(group, shared, call, parts, len)?;
    for piece in pieces {
        let mut theirs = Vec::with_capacity(shared.links.len());
        for (index, link) in shared.links.iter().enumerate() {
            let count = order.iter().filter(|(rank, _)| *rank == link.rank).count() * piece.len();
            let bytes = shared.receive(index, call)?;
            let values: Option<Vec<f32>> = floats(&bytes, count).map(Iterator::collect);
            theirs.push(values.ok_or_else(|| group.unreadable(link.rank, "a piece has another length"))?);
        }
        let start = total.len();
        for (rank, at) in &order {
            let values = match rank.checked_sub(1) {
                None => &parts[*at].1[piece.clone()],
                Some(index) => &theirs[index][at * piece.len()..][..piece.len()],
            };
            match total.len() == start {
                true => total.extend(values),
                false => total[start..].iter_mut().zip(values).for_each(|(sum, value)| *sum += value),
            }
        }
        let mut bytes = Vec::with_capacity(piece.len() * 4);
        append(&mut bytes, &total[start..]);
        (0..shared.links.len()).try_for_each(|index| shared.send(index, call, &bytes))?;
    }
    Ok(total)
}

/// For each number, the rank that has the part, and where it stands among the rank's parts.
fn order(
    group: &Group,
    shared: &Shared,
    call: Call,
    parts: &[(usize, &[f32])],
    len: usize,
) -> Result<Vec<(usize, usize)>, DistError> {
    let mut heads = vec![(0, parts.iter().map(|(number, _)| *number as u64).collect::<Vec<_>>())];
    for (index, link) in shared.links.iter().enumerate() {
        let head = shared.receive(index, call)?;
        let mut numbers = head.chunks_exact(8).map(|n| n.iter().rev().fold(0, |n, byte| n << 8 | u64::from(*byte)));
        let theirs = numbers.next();
        if theirs != Some(len as u64) {
            let problem = format!("it sums {theirs:?} elements where rank 0 sums {len}");
            return Err(group.unreadable(link.rank, &problem));
        }
        heads.push((link.rank, numbers.collect()));
    }
    let count = heads.iter().map(|(_, numbers)| numbers.len()).sum();
    let mut order = vec![None; count];
    for (rank, numbers) in heads {
        for (at, number) in numbers.into_iter().enumerate() {
            let place = usize::try_from(number).ok().and_then(|number| order.get_mut(number)).filter(|p| p.is_none());
            *place
                .ok_or_else(|| group.unreadable(rank, &format!("part {number} is there twice or beyond {count}")))? =
                Some((rank, at));
        }
    }
    match order.into_iter().collect::<Option<Vec<_>>>().filter(|order| !order.is_empty()) {
        Some(order) => Ok(order),
        None => Err(group.unreadable(0, "there is nothing to sum")),
    }
}

/// Writes values in little endian.
fn append(bytes: &mut Vec<u8>, values: &[f32]) {
    values.iter().for_each(|value| bytes.extend_from_slice(&value.to_le_bytes()));
}

/// The values of bytes that hold `count` of them.
fn floats(bytes: &[u8], count: usize) -> Option<impl Iterator<Item = f32>> {
    let values = bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    (bytes.len() == count * 4).then_some(values)
}
