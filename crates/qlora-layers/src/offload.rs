//! Tensors that wait in the host's memory while the device computes.
//!
//! On CUDA, copies in both directions run beside the kernels, to and from pinned memory ([`host_copies`]). A tensor that
//! goes to the host was just computed on the stream that the copy waits for, so the copy carries its final values. A buffer
//! stays reserved until its copy is done, and the host queues work far ahead of the device. Two rules therefore bound the
//! device memory that copies hold to two blocks' tensors: on the way to the host, callers
//! [finish](Parked::finish_download) the copies before the last ones; on the way back, they keep [`Pace`].
//!
//! Other runtimes have one queue for everything and wait for each copy to the host (with WGSL, nothing else may be queued
//! while a buffer is being read). On the CPU a tensor is in the host's memory already and stays where it is.

use std::collections::VecDeque;
use std::fmt;

use burn::tensor::{DType, Shape, Tensor};
use burn_cubecl::CubeDevice;
use burn_cubecl::tensor::CubeTensor;
use cubecl::bytes::Bytes;
use host_copies::{Copies, DeviceError, Download, as_cube, from_cube};

/// A tensor that waits for its use.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "a few for each block, and they stay where they are")]
pub(crate) enum Parked<const D: usize> {
    /// Where it was made.
    OnDevice(Tensor<D>),
    /// In the host's memory, or on the way there.
    OnHost(Offloaded),
}

impl<const D: usize> Parked<D> {
    /// Starts copying a tensor to the host, unless the tensor is there already.
    ///
    /// # Errors
    /// The copy failed, or the work whose result it copies did.
    pub(crate) fn to_host(tensor: Tensor<D>) -> Result<Self, DeviceError> {
        Ok(match as_cube(&tensor) {
            Some(cube) => Self::OnHost(Offloaded::start_download(cube)?),
            None => Self::OnDevice(tensor),
        })
    }

    /// Waits until the copy to the host is done, if there is one.
    ///
    /// # Errors
    /// The copy failed, or the work whose result it copies did.
    pub(crate) fn finish_download(&mut self) -> Result<(), DeviceError> {
        match self {
            Self::OnDevice(_) => Ok(()),
            Self::OnHost(tensor) => tensor.finish_download(),
        }
    }

    /// Starts the copy back to the tensor's device.
    ///
    /// # Errors
    /// The copy to the host failed.
    pub(crate) fn start_upload(self) -> Result<Self, DeviceError> {
        self.into_tensor().map(Self::OnDevice)
    }

    /// The tensor on its device. Its copy back may still be running; kernels that use the tensor wait for the copy.
    ///
    /// # Errors
    /// The copy to the host failed.
    pub(crate) fn into_tensor(self) -> Result<Tensor<D>, DeviceError> {
        match self {
            Self::OnDevice(tensor) => Ok(tensor),
            Self::OnHost(tensor) => tensor.upload().map(from_cube),
        }
    }
}

/// A tensor that left the device.
pub(crate) struct Offloaded {
    copy: HostCopy,
    device: CubeDevice,
    shape: Shape,
    dtype: DType,
}

/// A copy in the host's memory.
enum HostCopy {
    Leaving(Download),
    Arrived(Bytes),
    /// The download failed.
    Lost,
}

impl HostCopy {
    fn wait(self) -> Result<Bytes, DeviceError> {
        match self {
            Self::Leaving(download) => download.wait(),
            Self::Arrived(bytes) => Ok(bytes),
            Self::Lost => {
                Err(DeviceError::Failed("an offloaded tensor was lost when its copy to the host failed".into()))
            }
        }
    }
}

impl fmt::Debug for Offloaded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Offloaded").field("shape", &self.shape).field("dtype", &self.dtype).finish_non_exhaustive()
    }
}

impl Offloaded {
    fn start_download(tensor: CubeTensor) -> Result<Self, DeviceError> {
        let copies = Copies::of(&tensor.client);
        let download = copies.download(tensor.handle);
        let copy = if copies.run_beside_kernels() {
            HostCopy::Leaving(download)
        } else {
            // The bytes may be a view of a buffer that the device can't use meanwhile.
            HostCopy::Arrived(Bytes::from_bytes_vec(download.wait()?.to_vec()))
        };
        Ok(Self { copy, device: tensor.device, shape: tensor.meta.shape().clone(), dtype: tensor.dtype })
    }

    fn finish_download(&mut self) -> Result<(), DeviceError> {
        self.copy = HostCopy::Arrived(std::mem::replace(&mut self.copy, HostCopy::Lost).wait()?);
        Ok(())
    }

    fn upload(self) -> Result<CubeTensor, DeviceError> {
        let bytes = self.copy.wait()?;
        let client = self.device.client();
        let handle = Copies::of(&client).upload(bytes);
        Ok(CubeTensor::new_contiguous(client, self.device, self.shape, handle, self.dtype))
    }
}

/// Lets the host run no further ahead of the device than two of the places that it [marks](Self::mark).
#[derive(Default)]
pub(crate) struct Pace(VecDeque<Download>);

impl Pace {
    /// Marks this place in the queue of `tensor`'s device, and waits until the device has come to the mark before the
    /// last.
    ///
    /// # Errors
    /// Work that was queued before the mark failed.
    pub(crate) fn mark(&mut self, tensor: &Tensor<2>) -> Result<(), DeviceError> {
        let Some(copies) = as_cube(tensor).map(|cube| Copies::of(&cube.client)) else { return Ok(()) };
        if !copies.run_beside_kernels() {
            return Ok(());
        }
        if self.0.len() == 2
            && let Some(earlier) = self.0.pop_front()
        {
            earlier.wait()?;
        }
        let mark = copies.client().create_from_slice(&[0; 4]);
        self.0.push_back(copies.download_behind_kernels(mark));
        Ok(())
    }
}
