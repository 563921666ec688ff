//! Frozen weights that a device holds for some blocks at a time.
//!
//! The 4-bit weights of a streamed block lie one behind the other in a memory elsewhere, in the host's for example. The device
//! has a few [slots](Slot), each with room for one block, and block number `i` of the streamed ones always comes into slot
//! `i mod SLOTS`. So its layers hold views of that slot once and for all: what captures a packed weight, such as a node of an
//! autodiff graph or a product over several layers, stays valid without knowing of any of this, as long as the block is in
//! its slot when the device runs.
//!
//! - Whoever runs through blocks [enters](BlockHome::enter) each one before it queues work that reads its weights, forward,
//!   again or backward, and says in which [`Order`] the next ones come. They are fetched meanwhile.
//! - A layer that is read outside such a pass, to be merged or looked at, enters its block by itself.
//! - Where a block's bytes come from is a [`BlockSource`]'s business.
//!
//! One pass at a time may run over the blocks of a [`StreamedBlocks`], its clones included: two would take each other's weights
//! away.

mod host;
mod schedule;

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use burn::tensor::{Device, Int, Tensor};
use host_copies::{DeviceError, Slot};

pub use host::{HostStore, Sharers};
use schedule::Schedule;
pub use schedule::{Order, SLOTS};

use crate::LayerError;

/// A view begins at a multiple of so many words; where it is a view of a view, what lies behind it takes a multiple of so many too,
/// or devices make it a copy.
pub(crate) const VIEW_WORDS: usize = Slot::ALIGNMENT;

/// Where the words of streamed blocks come from. Blocks are numbered among the streamed ones, first to last.
pub trait BlockSource: Send {
    /// Starts bringing a block's words to the beginning of `slot`.
    ///
    /// The slot is written to only when the device is done with all that the calling thread has queued so far: kernels that
    /// read the former content are among it. What the thread queues afterwards is not held up, until [`arrive`](Self::arrive).
    ///
    /// # Errors
    /// The words can't be had, or the device fails. All later calls may fail then.
    fn fill(&mut self, block: usize, slot: &mut Slot) -> Result<(), DeviceError>;

    /// Has what the calling thread queues from now on wait for the last fill of `slot`, which was of this block.
    ///
    /// # Errors
    /// As [`fill`](Self::fill).
    fn arrive(&mut self, block: usize, slot: &mut Slot) -> Result<(), DeviceError>;

    /// Puts other words in the place of a block's, from word `start` on. Slots that hold the block are filled anew.
    ///
    /// # Errors
    /// As [`fill`](Self::fill).
    fn write(&mut self, block: usize, start: usize, words: &[u32]) -> Result<(), DeviceError>;

    /// Words of a slot that a fill writes to for a block of `words` words: these and perhaps a few more.
    fn room(&self, words: usize) -> usize {
        words
    }

    /// Bytes that a fill brings over the bus from the host's memory.
    fn bus_bytes(&self, block: usize) -> u64;

    /// Bytes of the host's memory that the blocks take.
    fn host_bytes(&self) -> u64;
}

/// Takes the blocks that are to be streamed while a model is loaded, one after the other, so that the device never holds all of
/// them.
pub trait BlockStore {
    /// Takes the next block. Its tensors are u32, on the device or in the host's memory, and are the caller's no longer.
    ///
    /// # Errors
    /// There is no room for the block, or its tensors can't be read.
    fn push(&mut self, tensors: Vec<Tensor<1, Int>>) -> Result<(), LayerError>;

    /// The blocks, with slots for them on the device.
    ///
    /// # Errors
    /// The device has no room for the slots.
    fn finish(self: Box<Self>) -> Result<StreamedBlocks, DeviceError>;
}

/// What a model streams, and what that has moved so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Streaming {
    /// Blocks that are streamed.
    pub blocks: usize,
    /// Places on the device for one block each.
    pub slots: usize,
    /// Bytes of all slots.
    pub slot_bytes: u64,
    /// Bytes of the host's memory.
    pub host_bytes: u64,
    /// Bytes brought over the bus since the start.
    pub bytes_in: u64,
}

/// The blocks of a model whose weights the device has for some time only. Clones are the same blocks.
#[derive(Clone)]
pub struct StreamedBlocks {
    /// Where each tensor of a block begins and how long it is, by streamed block.
    parts: Arc<[Vec<Part>]>,
    pager: Arc<Mutex<Pager>>,
}

/// Words of one tensor in a block's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    start: usize,
    len: usize,
}

impl fmt::Debug for StreamedBlocks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StreamedBlocks").field("blocks", &self.parts.len()).finish_non_exhaustive()
    }
}

impl StreamedBlocks {
    /// Blocks whose words come from `source`. `lens` has the words of each tensor of each block, in the order in which
    /// [layers](crate::Linear4bit) give them; a block's words have them where [`layout`] says.
    ///
    /// # Errors
    /// The device has no room for the slots.
    pub fn new(device: &Device, lens: &[Vec<usize>], source: Box<dyn BlockSource>) -> Result<Self, DeviceError> {
        let parts: Arc<[Vec<Part>]> = lens.iter().map(|lens| parts_of(lens)).collect();
        let longest = lens.iter().map(|lens| source.room(layout(lens).1)).max().unwrap_or(0);
        let slots = (0..SLOTS.min(parts.len())).map(|_| Slot::new(device, longest)).collect::<Result<Vec<_>, _>>()?;
        let arrived = vec![true; slots.len()];
        let schedule = Schedule::new(parts.len());
        let pager = Pager { source, slots, schedule, arrived, bytes_in: 0, failure: None };
        Ok(Self { parts, pager: Arc::new(Mutex::new(pager)) })
    }

    /// What is streamed, and what was moved.
    pub fn streaming(&self) -> Streaming {
        let pager = self.lock();
        Streaming {
            blocks: self.parts.len(),
            slots: pager.slots.len(),
            slot_bytes: pager.slots.iter().map(|slot| 4 * slot.len() as u64).sum(),
            host_bytes: pager.source.host_bytes(),
            bytes_in: pager.bytes_in,
        }
    }

    /// The home of a streamed block, by its number among them.
    pub fn home(&self, block: usize) -> BlockHome {
        BlockHome { blocks: self.clone(), block }
    }

    fn lock(&self) -> MutexGuard<'_, Pager> {
        self.pager.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where the tensors of a block begin in its memory, given their words, and how many words it has in all.
pub fn layout(lens: &[usize]) -> (Vec<usize>, usize) {
    let mut end = 0;
    let starts = lens.iter().map(|len| {
        let start = end;
        end += len.next_multiple_of(VIEW_WORDS);
        start
    });
    (starts.collect(), end)
}

fn parts_of(lens: &[usize]) -> Vec<Part> {
    layout(lens).0.into_iter().zip(lens).map(|(start, &len)| Part { start, len }).collect()
}

/// One streamed block.
#[derive(Clone)]
pub struct BlockHome {
    blocks: StreamedBlocks,
    block: usize,
}

impl fmt::Debug for BlockHome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("BlockHome").field(&self.block).finish()
    }
}

impl BlockHome {
    /// Has the block's weights in its slot for what the calling thread queues until it enters another block, and starts
    /// fetching the blocks that come next in `order`.
    ///
    /// # Errors
    /// The source or the device failed, now or before.
    pub fn enter(&self, order: Order) -> Result<(), DeviceError> {
        self.blocks.lock().enter(self.block, order)
    }

    /// What is streamed with it.
    pub fn streaming(&self) -> Streaming {
        self.blocks.streaming()
    }

    /// As [`enter`](Self::enter), where nothing is known of what comes next. A failure is told to whoever enters a block next.
    pub(crate) fn ensure(&self) {
        let mut pager = self.blocks.lock();
        if !pager.is_in(self.block) {
            let order = pager.schedule.order();
            let _ = pager.enter(self.block, order);
        }
    }

    /// Views of the slot for the block's tensors, in their order.
    pub fn views(&self) -> Views {
        let pager = self.blocks.lock();
        let slot = &pager.slots[self.block % pager.slots.len()];
        let views =
            self.blocks.parts[self.block].iter().map(|part| slot.view(part.start, part.len)).collect::<Vec<_>>();
        Views { home: self.clone(), views: views.into_iter(), next: 0 }
    }

    /// Puts other words in the place of the tensor of this number.
    pub(crate) fn write(&self, part: usize, words: &[u32]) -> Result<(), LayerError> {
        let of_block = &self.blocks.parts[self.block];
        let Some(part) = of_block.get(part).filter(|part| part.len == words.len()) else {
            return Err(LayerError::Weight(format!("{} words are no part of a streamed block", words.len())));
        };
        let failed = |source| LayerError::Read { what: "a streamed weight".into(), source };
        self.blocks.lock().write(self.block, part.start, words).map_err(failed)
    }
}

/// Views of a slot, one for each tensor of a block, for layers to [settle](crate::Linear4bit::settle) in.
#[derive(Debug)]
pub struct Views {
    home: BlockHome,
    views: std::vec::IntoIter<Tensor<1, Int>>,
    next: usize,
}

impl Views {
    /// The views of the next `N` tensors, the home, and the number of the first of them.
    pub(crate) fn next<const N: usize>(&mut self) -> Result<([Tensor<1, Int>; N], BlockHome, usize), LayerError> {
        let first = self.next;
        self.next += N;
        let views: Vec<_> = self.views.by_ref().take(N).collect();
        let views = views.try_into().map_err(|_| LayerError::Weight("a streamed block has fewer tensors".into()))?;
        Ok((views, self.home.clone(), first))
    }
}

/// Slots, and what is in them.
struct Pager {
    source: Box<dyn BlockSource>,
    slots: Vec<Slot>,
    schedule: Schedule,
    /// Whether somebody has waited for the last fill of each.
    arrived: Vec<bool>,
    bytes_in: u64,
    failure: Option<DeviceError>,
}

impl Pager {
    fn is_in(&self, block: usize) -> bool {
        self.schedule.holds(block) && self.arrived[block % self.slots.len()]
    }

    fn enter(&mut self, block: usize, order: Order) -> Result<(), DeviceError> {
        if let Some(failure) = &self.failure {
            return Err(failure.clone());
        }
        let entered = self.try_enter(block, order);
        if let Err(error) = &entered {
            self.failure = Some(error.clone());
        }
        entered
    }

    fn try_enter(&mut self, block: usize, order: Order) -> Result<(), DeviceError> {
        if !self.schedule.holds(block) {
            self.fill(block)?;
        }
        let slot = block % self.slots.len();
        if !std::mem::replace(&mut self.arrived[slot], true) {
            self.source.arrive(block, &mut self.slots[slot])?;
        }
        // Behind what waits for this block, or that would wait for the next ones too.
        for next in self.schedule.enter(block, order) {
            self.fill(next)?;
        }
        Ok(())
    }

    fn fill(&mut self, block: usize) -> Result<(), DeviceError> {
        let slot = block % self.slots.len();
        self.source.fill(block, &mut self.slots[slot])?;
        self.schedule.filled(block);
        self.arrived[slot] = false;
        self.bytes_in += self.source.bus_bytes(block);
        Ok(())
    }

    fn write(&mut self, block: usize, start: usize, words: &[u32]) -> Result<(), DeviceError> {
        self.source.write(block, start, words)?;
        self.schedule.forget(block);
        Ok(())
    }
}
