//! The text of a kernel, with what names it in caches.

use std::fmt::Write as _;
use std::sync::{Arc, PoisonError, RwLock};

use cubecl::hash::{StableHash, StableHasher};

use crate::signature::parameters;

/// CUDA C++ text, the name of its entry point, and the threads of a cube. Cheap to clone.
///
/// Two sources are the same kernel when all three are equal: the key of every cache, in memory and on disk,
/// holds a hash of the text.
#[derive(Debug, Clone)]
pub struct Source {
    name: &'static str,
    text: Arc<str>,
    cube_dim: u32,
    hash: StableHash,
    parameters: Option<usize>,
}

impl Source {
    /// A kernel from its whole text. Hashes the text: keep the source, or use
    /// [`with_defines`](Self::with_defines), which does.
    pub fn new(name: &'static str, cube_dim: u32, text: impl Into<Arc<str>>) -> Self {
        let text = text.into();
        let hash = StableHasher::hash_one(&text);
        let parameters = parameters(&text, name);
        Self { name, text, cube_dim, hash, parameters }
    }

    /// A kernel from a file and the `#define`s in front of it. Each combination is put together once per
    /// process and then found again.
    pub fn with_defines(
        file: &'static str,
        name: &'static str,
        cube_dim: u32,
        defines: &[(&'static str, i64)],
    ) -> Self {
        struct Variant {
            file: &'static str,
            defines: Vec<(&'static str, i64)>,
            source: Source,
        }
        // Few enough that a scan is the fastest search; a file in the binary is known by its address.
        static VARIANTS: RwLock<Vec<Variant>> = RwLock::new(Vec::new());
        let is_same = |variant: &Variant| {
            std::ptr::eq(variant.file, file)
                && variant.source.name == name
                && variant.source.cube_dim == cube_dim
                && variant.defines == defines
        };
        let variants = VARIANTS.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(variant) = variants.iter().find(|variant| is_same(variant)) {
            return variant.source.clone();
        }
        drop(variants);
        let mut text = String::with_capacity(file.len() + 32 * defines.len());
        for (key, value) in defines {
            // Writing to a string can't fail.
            let _ = writeln!(text, "#define {key} {value}");
        }
        text.push_str(file);
        let source = Self::new(name, cube_dim, text);
        let variant = Variant { file, defines: defines.to_vec(), source: source.clone() };
        VARIANTS.write().unwrap_or_else(PoisonError::into_inner).push(variant);
        source
    }

    /// The kernel for a compute capability below 8.0, whatever it is compiled for: `TURING` of
    /// [`prelude!`](crate::prelude!) is 1.
    pub fn for_turing(&self) -> Self {
        static VARIANTS: RwLock<Vec<(Source, Source)>> = RwLock::new(Vec::new());
        let is_same = |(plain, _): &&(Self, Self)| {
            plain.name == self.name && plain.cube_dim == self.cube_dim && plain.hash == self.hash
        };
        let variants = VARIANTS.read().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, turing)) = variants.iter().find(is_same) {
            return turing.clone();
        }
        drop(variants);
        let turing = Self::new(self.name, self.cube_dim, format!("#define TURING 1\n{}", self.text));
        let mut variants = VARIANTS.write().unwrap_or_else(PoisonError::into_inner);
        variants.push((self.clone(), turing.clone()));
        turing
    }

    /// Entry point.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// What NVRTC compiles.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Threads per cube.
    pub fn cube_dim(&self) -> u32 {
        self.cube_dim
    }

    /// Names the text.
    pub(crate) fn hash(&self) -> StableHash {
        self.hash
    }

    /// Parameters of the entry point, where the text shows them plainly.
    pub(crate) fn parameters(&self) -> Option<usize> {
        self.parameters
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "extern \"C\" __global__ void k(float* x) { x[0] = N; }";

    #[test]
    fn the_hash_covers_the_text() {
        let of = |text: &str| Source::new("k", 32, text).hash();
        assert_eq!(of("a"), of("a"));
        assert_ne!(of("a"), of("b"));
    }

    #[test]
    fn the_text_for_turing_is_put_together_once() {
        let plain = Source::new("k", 32, FILE);
        let turing = plain.for_turing();
        assert_eq!(turing.text(), format!("#define TURING 1\n{FILE}"));
        assert_ne!(turing.hash(), plain.hash());
        assert!(Arc::ptr_eq(&plain.clone().for_turing().text, &turing.text));
        assert_ne!(Source::new("k", 64, FILE).for_turing().cube_dim(), turing.cube_dim());
    }

    #[test]
    fn defines_come_first_and_are_put_together_once() {
        let one = Source::with_defines(FILE, "k", 32, &[("N", 1), ("M", -2)]);
        assert_eq!(one.text(), format!("#define N 1\n#define M -2\n{FILE}"));
        assert_eq!((one.name(), one.cube_dim(), one.parameters()), ("k", 32, Some(1)));
        let again = Source::with_defines(FILE, "k", 32, &[("N", 1), ("M", -2)]);
        assert!(Arc::ptr_eq(&one.text, &again.text));
        for other in [
            Source::with_defines(FILE, "k", 32, &[("N", 2), ("M", -2)]),
            Source::with_defines(FILE, "k", 64, &[("N", 1), ("M", -2)]),
            Source::with_defines("/* another */", "k", 32, &[("N", 1), ("M", -2)]),
        ] {
            assert!(!Arc::ptr_eq(&one.text, &other.text));
        }
    }
}
