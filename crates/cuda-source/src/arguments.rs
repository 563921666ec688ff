//! What a launch passes to a kernel.

use cubecl::prelude::BufferIOAttr;
use cubecl::server::{Handle, KernelArguments, KernelResource, MetadataBindingInfo};

use crate::LaunchError;
use crate::tensor_map::TensorMap;

/// Buffers and tensor maps in the order of the kernel's parameters, and the parameter struct.
///
/// Each buffer is declared as read or written. A launch that fails invalidates only the buffers that it was to write,
/// and a launch that reads an invalid buffer does not run.
#[derive(Debug, Default)]
pub struct Arguments {
    resources: Vec<(Argument, BufferIOAttr)>,
    params: Option<Vec<u64>>,
}

#[derive(Debug)]
enum Argument {
    Buffer(Handle),
    Map(TensorMap),
}

impl Arguments {
    /// No arguments.
    pub fn new() -> Self {
        Self::default()
    }

    /// A buffer that the kernel reads.
    pub fn read(self, handle: &Handle) -> Self {
        self.buffer(handle, BufferIOAttr::ReadOnly)
    }

    /// A buffer that the kernel fills without reading it.
    pub fn write(self, handle: &Handle) -> Self {
        self.buffer(handle, BufferIOAttr::WriteOnly)
    }

    /// A buffer that the kernel updates.
    pub fn read_write(self, handle: &Handle) -> Self {
        self.buffer(handle, BufferIOAttr::ReadWrite)
    }

    /// [Counters](crate::counters()) that the kernel updates and leaves at zero. A launch that does not run leaves them
    /// at zero too, so they are declared such that its failure does not reach the launches after it, which share them.
    pub fn counters(self, handle: &Handle) -> Self {
        self.buffer(handle, BufferIOAttr::WriteOnly)
    }

    /// A matrix or array that the kernel loads with TMA.
    pub fn tensor_map(mut self, map: impl Into<TensorMap>) -> Self {
        self.resources.push((Argument::Map(map.into()), BufferIOAttr::ReadOnly));
        self
    }

    /// A matrix or array that the kernel stores with TMA.
    pub fn tensor_map_write(mut self, map: impl Into<TensorMap>) -> Self {
        self.resources.push((Argument::Map(map.into()), BufferIOAttr::WriteOnly));
        self
    }

    /// The parameter struct, `repr(C)`: by value, as the kernel's last parameter. `NoUninit` refuses hidden
    /// padding, so the struct on the device is padded alike as soon as its size is a multiple of 8.
    pub fn params(mut self, params: impl bytemuck::NoUninit) -> Self {
        let bytes = bytemuck::bytes_of(&params);
        let mut words = vec![0_u64; bytes.len().div_ceil(8)];
        bytemuck::cast_slice_mut::<u64, u8>(&mut words)[..bytes.len()].copy_from_slice(bytes);
        self.params = Some(words);
        self
    }

    fn buffer(mut self, handle: &Handle, io: BufferIOAttr) -> Self {
        self.resources.push((Argument::Buffer(handle.clone()), io));
        self
    }

    /// Parameters of the kernel that these arguments fill.
    pub(crate) fn count(&self) -> usize {
        self.resources.len() + usize::from(self.params.is_some())
    }

    /// Position of the first tensor map.
    pub(crate) fn first_map(&self) -> Option<usize> {
        self.resources.iter().position(|(argument, _)| matches!(argument, Argument::Map(_)))
    }

    /// CubeCL's form of it.
    pub(crate) fn bindings(self, kernel: &'static str) -> Result<KernelArguments, LaunchError> {
        let mut arguments = KernelArguments::new();
        arguments.resources.reserve_exact(self.resources.len());
        arguments.declared_io.reserve_exact(self.resources.len());
        for (index, (argument, io)) in self.resources.into_iter().enumerate() {
            arguments.resources.push(match argument {
                Argument::Buffer(handle) => KernelResource::Buffer(handle.binding()),
                Argument::Map(map) => {
                    KernelResource::TensorMap(map.binding().map_err(|reason| LaunchError::TensorMap {
                        kernel,
                        index,
                        reason,
                    })?)
                }
            });
            arguments.declared_io.push(io);
        }
        if let Some(params) = self.params {
            // Everything before the "dynamic" part of the info goes by value, after the buffers; a dynamic
            // part that starts at the end is empty and makes no buffer.
            let len = params.len();
            arguments.info = MetadataBindingInfo::new(params, len);
        }
        Ok(arguments)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_go_by_value() {
        #[repr(C)]
        #[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
        struct Params {
            n: u32,
            factor: f32,
            last: u32,
        }
        let arguments = Arguments::new().params(Params { n: 7, factor: 1.0, last: 9 });
        assert_eq!(arguments.count(), 1);
        let bindings = arguments.bindings("k").unwrap();
        assert_eq!(bindings.info.data, [7 | 0x3f80_0000 << 32, 9]);
        assert_eq!(bindings.info.dynamic_metadata_offset, 2);
        assert!(bindings.resources.is_empty());
    }

    #[test]
    fn no_parameters_are_no_argument() {
        let arguments = Arguments::new();
        assert_eq!(arguments.count(), 0);
        assert!(arguments.bindings("k").unwrap().info.data.is_empty());
    }
}
