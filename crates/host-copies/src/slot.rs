//! Memory of a device that is filled again and again from the host's, in place.
//!
//! # Order on CUDA
//!
//! Fills run on a stream of their own beside the kernels, and not on that of other [copies](crate::Copies): what waits for an
//! activation would else wait for the weights behind it. CubeCL orders streams by buffers, each at the first use of a buffer
//! on a stream that did not make it; a buffer that is written over a second time orders nothing. So each fill has two marks,
//! fresh buffers of a word: the fill's stream uses one that was made behind the kernels which read the former content, and
//! whoever reads the new content first uses one that was made behind the fill.
//!
//! Elsewhere there is one queue, or none, and a fill is done where it stands in it.

use std::fmt;
use std::sync::{Arc, LazyLock};

use burn::backend::StreamId;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use burn_cubecl::tensor::CubeTensor;
use cubecl::bytes::Bytes;
use cubecl::client::Client;
use cubecl::server::Handle;

use crate::host_buffer::{Memory, View};
use crate::{DeviceError, HostBuffer, client_of, cube_of_int, int_from_cube, is_cuda, persistent};

/// Words of a device's memory that are filled in place. [Views](Self::view) of them stay valid, and show what was filled in
/// last.
pub struct Slot {
    words: Tensor<1, Int>,
    place: Place,
    /// Made behind the last fill, until somebody waits for it.
    arrival: Option<Handle>,
}

enum Place {
    /// The host's memory, which the tensor shares.
    Host(Arc<Memory>),
    Device {
        client: Client,
        buffer: Handle,
    },
}

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slot").field("words", &self.len()).finish_non_exhaustive()
    }
}

impl Slot {
    /// What devices want places in a buffer to be multiples of, in words.
    pub const ALIGNMENT: usize = 128;

    /// A slot of `words` words or a few more, with nothing in it.
    ///
    /// # Errors
    /// [`DeviceError`]: the device has no room for it.
    pub fn new(device: &Device, words: usize) -> Result<Self, DeviceError> {
        let words = words.next_multiple_of(Self::ALIGNMENT);
        let Some(client) = client_of(device) else {
            let memory = Arc::new(Memory::ordinary(words));
            let view = View(Arc::clone(&memory));
            // SAFETY: all bytes are initialised.
            let bytes = unsafe { Bytes::from_controller(Box::new(view), 4 * words) };
            let tensor = Tensor::from_data(TensorData::from_bytes(bytes, [words], DType::U32), (device, DType::U32));
            return Ok(Self { words: tensor, place: Place::Host(memory), arrival: None });
        };
        let tensor = persistent(device, words, |words| Tensor::<1, Int>::zeros([words], (device, DType::U32)));
        let Some(cube) = cube_of_int(tensor.clone()) else {
            return Err(DeviceError::Failed("a tensor of its own is not on it".into()));
        };
        client.check([&cube.handle])?;
        Ok(Self { words: tensor, place: Place::Device { client, buffer: cube.handle }, arrival: None })
    }

    /// Words.
    pub fn len(&self) -> usize {
        self.words.dims()[0]
    }

    /// Whether it has no words.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// `len` words from `start` on, a multiple of [`ALIGNMENT`](Self::ALIGNMENT), as a tensor of u32 that shares the memory.
    ///
    /// # Panics
    /// `start` is no such multiple, or the slot ends before.
    pub fn view(&self, start: usize, len: usize) -> Tensor<1, Int> {
        assert!(start.is_multiple_of(Self::ALIGNMENT), "views of a slot begin at multiples, not at {start}");
        let behind = self.len().checked_sub(start + len).unwrap_or_else(|| panic!("{len} words end behind the slot"));
        match (&self.place, cube_of_int(self.words.clone())) {
            (Place::Device { .. }, Some(cube)) => {
                // Burn makes a copy of what doesn't end at a multiple, too. A tensor may have less than its buffer.
                let behind = behind / Self::ALIGNMENT * Self::ALIGNMENT;
                let buffer = cube.handle.clone().offset_start(4 * start as u64).offset_end(4 * behind as u64);
                int_from_cube(CubeTensor::new_contiguous(cube.client, cube.device, [len].into(), buffer, DType::U32))
            }
            _ => self.words.clone().narrow(0, start, len),
        }
    }

    /// The buffer on a CubeCL runtime; `None` on the host.
    pub fn buffer(&self) -> Option<&Handle> {
        match &self.place {
            Place::Host(_) => None,
            Place::Device { buffer, .. } => Some(buffer),
        }
    }

    /// Starts filling the slot's first words from the host's memory, once the device is done with all that the calling thread
    /// has queued. Whoever reads them calls [`arrive`](Self::arrive) first. What the words behind them hold is unspecified then.
    ///
    /// # Errors
    /// [`DeviceError::Failed`]: the slot has less room.
    pub fn fill(&mut self, from: &HostBuffer) -> Result<(), DeviceError> {
        let (words, room) = (from.words().len(), self.len());
        if words > room {
            return Err(DeviceError::Failed(format!("{words} words were to fill a slot of {room}")));
        }
        match &self.place {
            // SAFETY: operations on the host are done when they return, and borrow the tensor's bytes no longer. The caller
            // has this slot to itself, and runs none now.
            Place::Host(memory) => unsafe { memory.overwrite(from.words()) },
            Place::Device { client, buffer } if is_cuda(client) => {
                let behind = Mark::here(client);
                self.arrival = Some(fills().executes(|| {
                    behind.wait(client);
                    client.write(buffer, from.bytes());
                    Mark::here(client).0
                }));
            }
            Place::Device { client, buffer } => client.write(buffer, from.bytes()),
        }
        Ok(())
    }

    /// Has what the calling thread queues from now on wait for the last fill.
    pub fn arrive(&mut self) {
        if let (Some(mark), Place::Device { client, .. }) = (self.arrival.take(), &self.place) {
            Mark(mark).wait(client);
        }
    }
}

/// The stream of fills.
fn fills() -> StreamId {
    static STREAM: LazyLock<StreamId> = LazyLock::new(StreamId::allocate);
    *STREAM
}

/// A place in a stream.
struct Mark(Handle);

impl Mark {
    /// The end of what the calling thread, or the stream that it stands for, has queued.
    fn here(client: &Client) -> Self {
        Self(client.empty(4))
    }

    /// Has the calling stream wait for the place.
    fn wait(self, client: &Client) {
        client.write(&self.0, Bytes::from_bytes_vec(vec![0; 4]));
    }
}
