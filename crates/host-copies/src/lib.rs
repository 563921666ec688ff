//! Copies between a device and the host's memory, and what can go wrong on a device.
//!
//! - [`Copies`] and [`Download`]: one stream for the copies of a device, one client that is never dropped, one kind of
//!   copy to the host that was started and is waited for later.
//! - [`persistent`]: memory for tensors that stay.
//! - [`staging()`]: room on the host for what is to be sent.
//! - [`HostBuffer`] and [`Slot`]: words that wait in the host's memory, and a place on the device that is filled from them
//!   beside the kernels, in place.
//! - [`SharedPages`]: such words in one copy for several processes.
//! - [`Reading`]: a few numbers that the host wants while the device goes on.
//! - [`into_cube`], [`as_cube`] and [`from_cube`]: the CubeCL tensor behind a Burn tensor, and back;
//!   [`from_buffer`]: a Burn tensor of a buffer; [`owned`]: a tensor that may be changed in place.
//! - [`Recording`]: a pass that is recorded once and replayed with other values in its inputs.
//! - [`free_memory`] and [`limit_memory`]: what a device has left, and one that is to behave as a smaller one.
//! - [`DeviceError`]: a device that is out of memory, told from one that failed.
//!
//! # Pinned memory
//!
//! On CUDA, CubeCL reads a buffer into pinned memory (`cuMemAllocHost`, from a pool of its own) without waiting, and gives
//! a fence to wait for. The bytes may rest in that memory, and go up again straight from it. Other runtimes have one
//! queue for everything and give ordinary memory.
//!
//! # What was not done
//!
//! A Burn tensor reveals its CubeCL tensor only through Burn's dispatch enum (`DispatchTensorKind`), which Burn changes
//! between versions; this crate is the one that has to follow.

mod copies;
mod error;
mod host_buffer;
mod memory;
mod reading;
mod recording;
mod shared_pages;
mod slot;
mod staging;
mod tensor;

pub use copies::{Copies, Download, client_of, is_cuda, persistent};
pub use error::DeviceError;
pub use host_buffer::HostBuffer;
pub use memory::{DeviceMemory, UNITS, free_memory, limit_memory, parse_size};
pub use reading::Reading;
pub use recording::{Recording, overwrite, overwrite_int};
pub use shared_pages::SharedPages;
pub use slot::Slot;
pub use staging::staging;
pub use tensor::{as_cube, cube_of_int, from_buffer, from_cube, int_from_buffer, int_from_cube, into_cube, owned};
