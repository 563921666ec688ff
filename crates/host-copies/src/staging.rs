//! Room on the host for bytes that a device is to have.

use cubecl::bytes::{AccessError, AccessPolicy, AllocationController, AllocationProperty, Bytes};
use cubecl::client::Client;
use std::mem::MaybeUninit;

/// `len` bytes on the host, to be filled and sent with [`Client::write`] or [`Client::create`]; what they hold is
/// unspecified. On CUDA they lie in pinned memory of CubeCL's pool, from which the device fetches them without the processor,
/// and which returns to the pool once it has.
///
/// Waits until CubeCL's thread has taken what was queued before. After every write of more than 10 MiB that thread waits for
/// the write before it, so someone who fills one buffer after the other holds three of them at most.
pub fn staging(client: &Client, len: usize) -> Bytes {
    // SAFETY: nobody reads a room: where it doesn't become memory, it is replaced below.
    let mut bytes = unsafe { Bytes::from_controller(Box::new(Room(len)), len) };
    client.staging(std::iter::once(&mut bytes), false);
    match bytes.property() {
        // Runtimes without pinned memory leave the room what it is.
        AllocationProperty::Other => Bytes::from_bytes_vec(vec![0; len]),
        _ => bytes,
    }
}

/// Stands for so many bytes that are nowhere yet. CubeCL makes a staging buffer by copying bytes into pinned memory;
/// those of a room it has not to copy.
struct Room(usize);

impl AllocationController for Room {
    fn alloc_align(&self) -> usize {
        1
    }

    fn property(&self) -> AllocationProperty {
        AllocationProperty::Other
    }

    unsafe fn memory_mut(&mut self, _: AccessPolicy) -> Result<&mut [MaybeUninit<u8>], AccessError> {
        Err(AccessError::WouldCopy)
    }

    fn memory(&self, _: AccessPolicy) -> Result<&[MaybeUninit<u8>], AccessError> {
        Err(AccessError::WouldCopy)
    }

    fn capacity(&self) -> usize {
        self.0
    }

    unsafe fn copy_into(&self, _: &mut [u8]) {}
}
