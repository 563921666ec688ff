//! `distributed.shard_base`: each rank holds a part of every block's frozen weights, and gathers a block's whole words when it is about to
//! compute with the block ([`qlora_layers::streamed`]).
//!
//! Rank i of N has the i-th N-th of a block's words, counted up to a whole number. They travel as bytes, because what they hold are
//! codes, which no format of numbers keeps. Between cards a gather runs beside the kernels, on a stream and among NCCL ranks of its own:
//! sums of gradients, which come in between, have their own order.
//!
//! Every rank gathers the same blocks in the same order. So all ranks do as many passes over the blocks as each other; one that has nothing
//! to compute [passes idly](qlora_models::Decoder::pass_idly), and none does a step once more by itself.

use std::fmt;
use std::ops::Range;

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use device_collectives::{CollectiveError, Fixed, Mark};
use host_copies::{DeviceError, HostBuffer, Slot, persistent};
use qlora_layers::LayerError;
use qlora_layers::streamed::{BlockSource, BlockStore, SLOTS, StreamedBlocks, layout};

use super::Ranks;
use super::devices::Cards;

/// Takes this rank's part of each block.
pub(crate) struct ShardStore {
    ranks: Ranks,
    device: Device,
    /// The way of the weights from card to card; without, they go through the memory of the hosts.
    cards: Option<Cards>,
    lens: Vec<Vec<usize>>,
    parts: Vec<Vec<u32>>,
}

impl fmt::Debug for ShardStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ShardStore").field("blocks", &self.parts.len()).finish_non_exhaustive()
    }
}

/// Words of each rank's part of a block.
fn part_len(words: usize, ranks: usize) -> usize {
    words.div_ceil(ranks)
}

fn failed(source: DeviceError) -> LayerError {
    LayerError::Read { what: "the weights of a block that ranks share".into(), source }
}

fn of_collectives(error: CollectiveError) -> DeviceError {
    match error {
        CollectiveError::Device(error) => error,
        CollectiveError::Aborted => DeviceError::Peer(error.to_string()),
        other => DeviceError::Failed(other.to_string()),
    }
}

impl ShardStore {
    pub(super) fn new(ranks: Ranks, device: &Device, cards: Option<Cards>) -> Self {
        Self { ranks, device: device.clone(), cards, lens: Vec::new(), parts: Vec::new() }
    }
}

impl BlockStore for ShardStore {
    fn push(&mut self, tensors: Vec<Tensor<1, Int>>) -> Result<(), LayerError> {
        let lens: Vec<usize> = tensors.iter().map(|tensor| tensor.dims()[0]).collect();
        let (starts, words) = layout(&lens);
        let len = part_len(words, self.ranks.count());
        let first = self.ranks.rank() * len;
        let mut part = vec![0; len];
        for (start, tensor) in starts.into_iter().zip(tensors) {
            let data = tensor.try_into_data().map_err(|error| failed(error.into()))?;
            let words = data.as_slice::<u32>().map_err(|error| failed(DeviceError::Failed(format!("{error:?}"))))?;
            put(&mut part, first, start, words);
        }
        self.lens.push(lens);
        self.parts.push(part);
        Ok(())
    }

    fn finish(self: Box<Self>) -> Result<StreamedBlocks, DeviceError> {
        let Self { ranks, device, cards, lens, parts } = *self;
        let source: Box<dyn BlockSource> = match cards {
            Some(cards) => Box::new(OverCards::new(ranks, &device, cards, parts)?),
            None => {
                let room = |lens: &Vec<usize>| part_len(layout(lens).1, ranks.count()) * ranks.count();
                let buffer = HostBuffer::new(&device, lens.iter().map(room).max().unwrap_or(0))?;
                Box::new(OverHosts { ranks, parts, buffer })
            }
        };
        StreamedBlocks::new(&device, &lens, source)
    }
}

/// Puts those of a block's `words` from `start` on that are within a part, which begins at `first`, in their places; which of the part these
/// are.
fn put(part: &mut [u32], first: usize, start: usize, words: &[u32]) -> Range<usize> {
    let from = start.max(first);
    let to = (start + words.len()).min(first + part.len());
    if from >= to {
        return 0..0;
    }
    part[from - first..to - first].copy_from_slice(&words[from - start..to - start]);
    from - first..to - first
}

/// Parts on cards.
struct OverCards {
    ranks: Ranks,
    device: Device,
    cards: Cards,
    parts: Vec<(Tensor<1, Int>, Fixed)>,
    /// The slots, by their numbers, and what comes there.
    slots: Vec<Option<Fixed>>,
    coming: Vec<Option<Mark>>,
}

impl OverCards {
    fn new(ranks: Ranks, device: &Device, cards: Cards, parts: Vec<Vec<u32>>) -> Result<Self, DeviceError> {
        let slots = || (0..SLOTS.min(parts.len())).map(|_| None);
        let (slots, coming) = (slots().collect(), (0..SLOTS.min(parts.len())).map(|_| None).collect());
        let parts = parts.into_iter().map(|part| on_card(device, &cards, part)).collect::<Result<_, _>>()?;
        Ok(Self { ranks, device: device.clone(), cards, parts, slots, coming })
    }
}

/// A part on the device.
fn on_card(device: &Device, cards: &Cards, part: Vec<u32>) -> Result<(Tensor<1, Int>, Fixed), DeviceError> {
    let len = part.len();
    let upload = |part| Tensor::from_data(TensorData::new(part, [len]), (device, DType::U32));
    let tensor = persistent(device, part, upload);
    let fixed = cards.collectives.fix(&tensor).map_err(of_collectives)?;
    Ok((tensor, fixed))
}

impl BlockSource for OverCards {
    fn fill(&mut self, block: usize, slot: &mut Slot) -> Result<(), DeviceError> {
        // Again each time: sums of gradients may have ended that.
        self.cards.collectives.beside(true);
        let number = block % self.slots.len();
        let to = match self.slots[number].take() {
            Some(to) => to,
            None => self.cards.collectives.fix(&slot.view(0, slot.len())).map_err(of_collectives)?,
        };
        self.coming[number] = Some(self.cards.collectives.gather(&self.parts[block].1, &to).map_err(of_collectives)?);
        self.slots[number] = Some(to);
        Ok(())
    }

    fn arrive(&mut self, block: usize, _: &mut Slot) -> Result<(), DeviceError> {
        let number = block % self.slots.len();
        match self.coming[number].take() {
            Some(mark) => self.cards.collectives.wait_for(mark).map(drop).map_err(of_collectives),
            None => Ok(()),
        }
    }

    fn write(&mut self, block: usize, start: usize, words: &[u32]) -> Result<(), DeviceError> {
        let mut part = self.parts[block].0.clone().try_into_vec_as::<u32>().map_err(DeviceError::from)?;
        let first = self.ranks.rank() * part.len();
        if !put(&mut part, first, start, words).is_empty() {
            self.parts[block] = on_card(&self.device, &self.cards, part)?;
        }
        Ok(())
    }

    fn room(&self, words: usize) -> usize {
        part_len(words, self.ranks.count()) * self.ranks.count()
    }

    fn bus_bytes(&self, _: usize) -> u64 {
        0
    }

    fn host_bytes(&self) -> u64 {
        0
    }
}

/// Parts in the memory of hosts, whatever computes.
struct OverHosts {
    ranks: Ranks,
    parts: Vec<Vec<u32>>,
    /// A whole block on its way to a slot.
    buffer: HostBuffer,
}

impl BlockSource for OverHosts {
    fn fill(&mut self, block: usize, slot: &mut Slot) -> Result<(), DeviceError> {
        let part = bytemuck::cast_slice::<u32, u8>(&self.parts[block]).to_vec();
        let all = self.ranks.all_gather(part).map_err(|error| DeviceError::Peer(error.to_string()))?;
        for (rank, part) in all.iter().enumerate() {
            let words: Vec<u32> = part.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
            if words.len() != self.parts[block].len() {
                return Err(DeviceError::Failed(format!("rank {rank} has another part of block {block}")));
            }
            self.buffer.write(rank * words.len(), &words)?;
        }
        slot.fill(&self.buffer)
    }

    fn arrive(&mut self, _: usize, slot: &mut Slot) -> Result<(), DeviceError> {
        slot.arrive();
        Ok(())
    }

    fn write(&mut self, block: usize, start: usize, words: &[u32]) -> Result<(), DeviceError> {
        let part = &mut self.parts[block];
        let first = self.ranks.rank() * part.len();
        put(part, first, start, words);
        Ok(())
    }

    fn room(&self, words: usize) -> usize {
        part_len(words, self.ranks.count()) * self.ranks.count()
    }

    fn bus_bytes(&self, block: usize) -> u64 {
        4 * (self.parts[block].len() * self.ranks.count()) as u64
    }

    fn host_bytes(&self) -> u64 {
        self.parts.iter().map(|part| 4 * part.len() as u64).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_all_ranks_are_the_whole() {
        for (words, ranks) in [(10, 2), (10, 3), (10, 4), (3, 4), (1, 1)] {
            let whole: Vec<u32> = (0..words as u32).map(|word| word + 1).collect();
            let len = part_len(words, ranks);
            let mut all = Vec::new();
            for rank in 0..ranks {
                let mut part = vec![0; len];
                // In three pieces, as tensors come.
                let (first, rest) = whole.split_at(words / 3);
                let (second, third) = rest.split_at(rest.len() / 2);
                let mut start = 0;
                for piece in [first, second, third] {
                    put(&mut part, rank * len, start, piece);
                    start += piece.len();
                }
                all.extend(part);
            }
            assert_eq!(all[..words], whole, "{words} over {ranks}");
            assert!(all[words..].iter().all(|word| *word == 0));
        }
        assert_eq!(put(&mut [0; 4], 8, 10, &[1, 2, 3]), 2..4);
        assert_eq!(put(&mut [0; 4], 8, 2, &[1, 2, 3]), 0..0);
    }
}
