//! The kernel as CubeCL sees it, and its launch.

use cubecl::client::Client;
use cubecl::ir::metadata::Info;
use cubecl::ir::settings::Dim3;
use cubecl::ir::{ElemType, UIntKind};
use cubecl::prelude::{
    AddressType, CubeCount, CubeKernel, ExecutionMode, KernelDefinition, KernelId, KernelMetadata, KernelSettings,
    PrecompiledSource, Scope,
};

use crate::{Arguments, LaunchError, Source, device};

/// Queues a kernel on the client's stream.
///
/// `cube_count` is CUDA's grid; with a zero in it nothing runs.
///
/// # Errors
///
/// [`LaunchError`] for what can be known without the device. What the compiler and the driver say comes with
/// a read of an output; see the crate's documentation.
///
/// # Panics
///
/// As every CubeCL launch: when a handle belongs to another device.
pub fn launch(
    client: &Client,
    source: &Source,
    cube_count: (u32, u32, u32),
    arguments: Arguments,
) -> Result<(), LaunchError> {
    let kernel = source.name();
    let Some(device) = device(client) else {
        return Err(LaunchError::NotCuda { kernel, runtime: client.name() });
    };
    let given = arguments.count();
    if let Some(expected) = source.parameters().filter(|expected| *expected != given) {
        return Err(LaunchError::Parameters { kernel, expected, given });
    }
    if let Some(index) = arguments.first_map().filter(|_| device.compute_capability < (9, 0)) {
        let (major, minor) = device.compute_capability;
        let reason = format!("TMA needs compute capability 9.0, this device has {major}.{minor}");
        return Err(LaunchError::TensorMap { kernel, index, reason });
    }
    let bindings = arguments.bindings(kernel)?;
    let (x, y, z) = cube_count;
    let source = if device.compute_capability < (8, 0) { source.for_turing() } else { source.clone() };
    client.launch(Box::new(Kernel(source)), CubeCount::Static(x, y, z), bindings);
    Ok(())
}

struct Kernel(Source);

impl Kernel {
    fn cube_dim(&self) -> Dim3 {
        Dim3 { x: self.0.cube_dim(), y: 1, z: 1 }
    }
}

impl KernelMetadata for Kernel {
    fn name(&self) -> &'static str {
        self.0.name()
    }

    fn id(&self) -> KernelId {
        // A kernel from the disk cache is launched with the id's cube_dim.
        KernelId::new::<Self>().cube_dim(self.cube_dim()).info((self.0.name(), self.0.hash()))
    }

    fn address_type(&self) -> ElemType {
        ElemType::UInt(UIntKind::U32)
    }
}

impl CubeKernel for Kernel {
    fn define(&self) -> KernelDefinition {
        let settings = KernelSettings::new(self.cube_dim(), ExecutionMode::Unchecked, AddressType::U32);
        KernelDefinition { body: Scope::root(settings.clone()), settings, info: Info::default() }
    }

    fn source(&self) -> Option<PrecompiledSource> {
        // CubeCL's cache on the disk takes kernels of the same text for the same kernel, whatever their entry points.
        Some(PrecompiledSource {
            source: format!("{}\n// {}\n", self.0.text(), self.0.name()),
            entrypoint_name: self.0.name().to_owned(),
            lang: "cuda",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_entry_points_of_one_text_are_two_texts() {
        let text = "extern \"C\" __global__ void k() {} extern \"C\" __global__ void l() {}";
        let of = |name| Kernel(Source::new(name, 32, text)).source().map(|source| source.source);
        assert!(of("k").is_some_and(|text_of_k| text_of_k.starts_with(text)) && of("k") != of("l"));
    }

    #[test]
    fn a_kernels_id_covers_text_name_and_threads() {
        let id = |name, cube_dim, text: &str| Kernel(Source::new(name, cube_dim, text)).id();
        let first = id("k", 256, "text");
        assert!(first == id("k", 256, "text"));
        assert_eq!(first.cube_dim, Dim3 { x: 256, y: 1, z: 1 });
        for other in [id("k", 256, "texts"), id("l", 256, "text"), id("k", 128, "text")] {
            assert!(first != other);
            assert_ne!(first.stable_hash(), other.stable_hash());
        }
    }
}
