//! Streamed blocks in the host's memory.

use std::fmt;
use std::time::Duration;

use burn::backend::DispatchTensorKind;
use burn::tensor::{Device, Int, Tensor};
use host_copies::{DeviceError, HostBuffer, SharedPages, Slot};
use rayon::prelude::*;

use super::{BlockSource, BlockStore, StreamedBlocks, layout};
use crate::LayerError;
use crate::ops::words;

/// Processes of one host that stream the same blocks from one copy.
pub struct Sharers {
    /// Where the copy is; nothing is taken of it yet.
    pub pages: SharedPages,
    /// This process's number among them.
    pub number: usize,
    /// How many they are.
    pub count: usize,
    /// Why it is no use to wait for the others, if it is none.
    pub failure: Box<dyn Fn() -> Option<String>>,
}

impl fmt::Debug for Sharers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sharers").field("number", &self.number).field("count", &self.count).finish_non_exhaustive()
    }
}

/// Blocks in the host's memory; on CUDA that is pinned.
#[derive(Debug)]
pub struct HostStore {
    device: Device,
    lens: Vec<Vec<usize>>,
    blocks: HostBlocks,
    sharers: Option<Sharers>,
}

impl HostStore {
    /// For a device that is to compute with the blocks.
    pub fn new(device: &Device) -> Self {
        Self { device: device.clone(), lens: Vec::new(), blocks: HostBlocks::default(), sharers: None }
    }

    /// The same, in one copy for several processes, each with a device of its own. All of them push the same blocks; each writes those
    /// that are its turn.
    pub fn shared(device: &Device, sharers: Sharers) -> Self {
        Self { sharers: Some(sharers), ..Self::new(device) }
    }
}

impl BlockStore for HostStore {
    fn push(&mut self, tensors: Vec<Tensor<1, Int>>) -> Result<(), LayerError> {
        let lens: Vec<usize> = tensors.iter().map(|tensor| tensor.dims()[0]).collect();
        let failed = |source: DeviceError| LayerError::Read { what: "the weights of a streamed block".into(), source };
        let (starts, len) = layout(&lens);
        let (buffer, is_mine) = match &mut self.sharers {
            Some(Sharers { pages, number, count, .. }) => {
                (HostBuffer::shared(&self.device, pages, len), self.lens.len() % *count == *number)
            }
            None => (HostBuffer::new(&self.device, len), true),
        };
        let mut buffer = buffer.map_err(failed)?;
        let Some(words) = buffer.words_mut() else {
            return Err(failed(DeviceError::Failed("fresh memory is in use".into())));
        };
        for (start, tensor) in starts.into_iter().zip(tensors).filter(|_| is_mine) {
            let len = tensor.dims()[0];
            copy(tensor, &mut words[start..start + len]).map_err(failed)?;
        }
        if is_mine {
            buffer.publish();
        }
        self.lens.push(lens);
        self.blocks.0.push(buffer);
        Ok(())
    }

    fn finish(self: Box<Self>) -> Result<StreamedBlocks, DeviceError> {
        if let Some(Sharers { failure, .. }) = &self.sharers {
            // Others may be slower by as much as their disks and cards are.
            while !self.blocks.0.iter().all(HostBuffer::is_published) {
                if let Some(failure) = failure() {
                    return Err(DeviceError::Peer(failure));
                }
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        StreamedBlocks::new(&self.device, &self.lens, Box::new(self.blocks))
    }
}

/// Copies the words of a tensor, on all processor cores.
fn copy(tensor: Tensor<1, Int>, to: &mut [u32]) -> Result<(), DeviceError> {
    const CHUNK: usize = 1 << 18;
    let fill = |to: &mut [u32], from: &[u32]| {
        to.par_chunks_mut(CHUNK).zip(from.par_chunks(CHUNK)).for_each(|(to, from)| to.copy_from_slice(from));
    };
    if let DispatchTensorKind::Flex(flex) = tensor.clone().into_dispatch().kind {
        fill(to, &words(&flex.int()));
        return Ok(());
    }
    let data = tensor.try_into_data()?;
    fill(to, data.as_slice::<u32>().map_err(|error| DeviceError::Failed(format!("{error:?}")))?);
    Ok(())
}

#[derive(Debug, Default)]
struct HostBlocks(Vec<HostBuffer>);

impl BlockSource for HostBlocks {
    fn fill(&mut self, block: usize, slot: &mut Slot) -> Result<(), DeviceError> {
        slot.fill(&self.0[block])
    }

    fn arrive(&mut self, _: usize, slot: &mut Slot) -> Result<(), DeviceError> {
        slot.arrive();
        Ok(())
    }

    fn write(&mut self, block: usize, start: usize, words: &[u32]) -> Result<(), DeviceError> {
        self.0[block].write(start, words)
    }

    fn bus_bytes(&self, block: usize) -> u64 {
        4 * self.0[block].words().len() as u64
    }

    fn host_bytes(&self) -> u64 {
        self.0.iter().map(|block| 4 * block.words().len() as u64).sum()
    }
}
