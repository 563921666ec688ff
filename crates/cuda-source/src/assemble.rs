//! What the assembler says of a kernel for a card that need not be there.

use std::ffi::{CStr, CString};

use cudarc::nvrtc::{result as nvrtc, sys};

use crate::{LaunchError, Source};

/// What a kernel takes of a multiprocessor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resources {
    /// Registers of a thread.
    pub registers: u32,
    /// Bytes of static shared memory of a cube.
    pub shared_bytes: u32,
    /// Bytes that a thread stores because registers do not suffice.
    pub spilled_bytes: u32,
}

impl Resources {
    /// Cubes of `cube_dim` threads that share a multiprocessor with 65,536 registers and `shared_bytes` of shared memory, of
    /// which each cube takes 1 KB more than it asks for.
    pub fn cubes(&self, cube_dim: u32, shared_bytes: u32) -> u32 {
        // Registers come in eights for a thread.
        let by_registers = 65_536 / (self.registers.next_multiple_of(8) * cube_dim).max(1);
        by_registers.min(shared_bytes / (self.shared_bytes + 1024))
    }
}

/// Makes machine code for a compute capability with NVRTC's own assembler, which needs no card, and says what it takes.
/// `None` without NVRTC.
///
/// A test of kernels for cards that nobody has at hand: it finds an instruction that a card lacks, and more static shared
/// memory than it takes.
///
/// # Errors
///
/// [`LaunchError::Text`] with the compiler's log.
pub fn assemble(source: &Source, compute_capability: (u32, u32)) -> Result<Option<Resources>, LaunchError> {
    // SAFETY: the call only tries to load the library.
    if !unsafe { sys::is_culib_present() } {
        return Ok(None);
    }
    let (major, minor) = compute_capability;
    let failed = |log: String| LaunchError::Text { kernel: source.name(), compute_capability, log };
    let text = CString::new(source.text()).map_err(|error| failed(error.to_string()))?;
    let program = nvrtc::create_program(&text, None).map_err(|error| failed(format!("{error:?}")))?;
    // `a`: instructions that no later card has, such as `wgmma`.
    let own = if compute_capability == (9, 0) { "a" } else { "" };
    let options = [format!("--gpu-architecture=sm_{major}{minor}{own}"), "--ptxas-options=-v".to_owned()];
    // SAFETY: the program was created above and is destroyed below, after its last use; the log ends with a zero.
    let (compiled, log) = unsafe {
        let compiled = nvrtc::compile_program(program, &options);
        let log = nvrtc::get_program_log(program)
            .map(|log| CStr::from_ptr(log.as_ptr()).to_string_lossy().into_owned())
            .unwrap_or_default();
        // What can't be destroyed is left.
        let _ = nvrtc::destroy_program(program);
        (compiled, log)
    };
    match resources(&log) {
        Some(resources) if compiled.is_ok() => Ok(Some(resources)),
        _ => Err(failed(log)),
    }
}

/// From the lines that `-v` makes the assembler write.
fn resources(log: &str) -> Option<Resources> {
    let before = |unit: &str| {
        let words = log[..log.find(unit)?].trim_end().rsplit(|c: char| !c.is_ascii_digit()).next()?;
        words.parse().ok()
    };
    Some(Resources {
        registers: before(" registers")?,
        shared_bytes: before(" bytes smem").unwrap_or(0),
        spilled_bytes: before(" bytes spill stores")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "ptxas info    : 0 bytes gmem\nptxas         .     8 bytes stack frame, 12 bytes spill stores, \
                       4 bytes spill loads\nptxas info    : Used 255 registers, used 1 barriers, 49152 bytes smem";

    #[test]
    fn the_assemblers_lines_are_read() {
        let all = Resources { registers: 255, shared_bytes: 49152, spilled_bytes: 12 };
        assert_eq!(resources(LOG), Some(all));
        assert_eq!(resources("Used 18 registers, 0 bytes spill stores").map(|r| r.shared_bytes), Some(0));
        assert_eq!(resources("error"), None);
        // 100 KB of compute capability 8.6 and 8.9 hold two of 49 KB.
        assert_eq!(all.cubes(128, 100 << 10), 2);
        assert_eq!(all.cubes(128, 64 << 10), 1);
        assert_eq!(Resources { registers: 168, ..all }.cubes(128, 164 << 10), 3);
    }

    #[test]
    fn what_a_card_lacks_is_an_error() {
        let kernel =
            |text: &str| Source::new("k", 32, format!("extern \"C\" __global__ void k(float* x) {{ {text} }}"));
        let large = kernel("__shared__ float s[16384]; s[threadIdx.x] = x[0]; __syncthreads(); x[1] = s[(int)x[2]];");
        let Ok(resources) = assemble(&kernel("x[0] = 1.0f;"), (8, 6)) else { panic!("an empty kernel") };
        if resources.is_none() {
            return;
        }
        assert!(matches!(assemble(&large, (8, 6)), Err(LaunchError::Text { .. })), "64 KB of static shared memory");
        let copy = kernel("asm volatile(\"cp.async.commit_group;\");");
        assert!(assemble(&copy, (8, 0)).is_ok());
        let Err(error) = assemble(&copy, (7, 5)) else { panic!("7.5 has no asynchronous copies") };
        assert!(error.to_string().contains("7.5"), "{error}");
    }
}
