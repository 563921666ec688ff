//! What the test suites share: the reference cases, and values in a format.
#![allow(dead_code, clippy::expect_used, clippy::unwrap_used)]

use half::{bf16, f16};
use nf4_quant::{Absmax, Element, FloatFormat, Metadata, NestedAbsmax, QuantConfig, QuantState};
use safetensors::{Dtype, SafeTensors};

/// One case of `bnb/quantize_4bit`: an input and what bitsandbytes made of it.
pub struct Case {
    pub name: String,
    /// Widened to f32, which is exact.
    pub input: Vec<f32>,
    pub config: QuantConfig,
    pub codes: Vec<u8>,
    pub state: QuantState,
    /// Widened to f32.
    pub dequantized: Vec<f32>,
    pub codebook: Vec<f32>,
    pub nested_map: Option<Vec<f32>>,
    pub json: String,
}

/// The folder with the reference data: the repository's, or another in the same layout.
pub fn reference_dir() -> std::path::PathBuf {
    match std::env::var_os("QLORA_REFERENCE") {
        Some(dir) => dir.into(),
        None => concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/reference").into(),
    }
}

pub fn cases() -> Vec<Case> {
    let dir = reference_dir().join("bnb");
    let bytes = std::fs::read(dir.join("quantize_4bit.safetensors")).expect("quantize_4bit.safetensors");
    let tensors = SafeTensors::deserialize(&bytes).expect("safetensors");
    let json = std::fs::read(dir.join("quantize_4bit.json")).expect("quantize_4bit.json");
    let cases: Vec<serde_json::Value> = serde_json::from_slice(&json).expect("json");
    assert!(!cases.is_empty());
    cases.iter().map(|case| read_case(&tensors, case)).collect()
}

fn read_case(tensors: &SafeTensors<'_>, case: &serde_json::Value) -> Case {
    let prefix = case["prefix"].as_str().expect("prefix");
    let floats = |name: &str| widen(&tensors.tensor(&format!("{prefix}{name}")).expect(name));
    let raw = |name: &str| tensors.tensor(&format!("{prefix}{name}")).expect(name).data().to_vec();
    let quant_type = case["quant_type"].as_str().expect("quant_type");
    let json = String::from_utf8(raw(&format!("weight.quant_state.bitsandbytes__{quant_type}"))).expect("UTF-8");
    let metadata = Metadata::parse(&json).expect("quant_state");
    let absmax = match metadata.nested {
        Some(nested) => Absmax::Nested(NestedAbsmax {
            codes: raw("weight.absmax"),
            absmax: floats("weight.nested_absmax"),
            offset: nested.offset,
            blocksize: nested.blocksize,
        }),
        None => Absmax::Plain(floats("weight.absmax")),
    };
    let Metadata { quant_type, blocksize, dtype, shape, nested } = metadata;
    Case {
        name: format!("{prefix} {shape:?} {dtype} {quant_type}/{blocksize} nested={}", nested.is_some()),
        input: match case["input"].as_str() {
            Some(shared) => widen(&tensors.tensor(shared).expect(shared)),
            None => floats("input"),
        },
        config: QuantConfig { quant_type, blocksize, double_quant: nested.is_some() },
        codes: raw("weight"),
        dequantized: floats("dequantized"),
        codebook: floats("weight.quant_map"),
        nested_map: nested.map(|_| floats("weight.nested_quant_map")),
        state: QuantState { quant_type, blocksize, dtype, shape, absmax },
        json,
    }
}

pub fn blockwise(name: &str) -> Vec<f32> {
    with_blockwise(name, widen)
}

pub fn blockwise_codes(name: &str) -> Vec<u8> {
    with_blockwise(name, |t| t.data().to_vec())
}

fn with_blockwise<T>(name: &str, read: impl Fn(&safetensors::tensor::TensorView<'_>) -> T) -> T {
    let path = reference_dir().join("bnb/quantize_blockwise.safetensors");
    let bytes = std::fs::read(path).expect("quantize_blockwise.safetensors");
    let tensors = SafeTensors::deserialize(&bytes).expect("safetensors");
    read(&tensors.tensor(name).expect(name))
}

fn widen(tensor: &safetensors::tensor::TensorView<'_>) -> Vec<f32> {
    let halves = || tensor.data().chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
    match tensor.dtype() {
        Dtype::F32 => tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        Dtype::BF16 => halves().map(|b| bf16::from_bits(b).to_f32()).collect(),
        Dtype::F16 => halves().map(|b| f16::from_bits(b).to_f32()).collect(),
        other => panic!("unexpected dtype {other:?}"),
    }
}

/// Rounds to a type; exact for values that were widened from it.
pub fn narrow<E: Element>(values: &[f32]) -> Vec<E> {
    values.iter().map(|v| E::from_f32(*v)).collect()
}

/// Calls a generic function with the element type of a format.
#[macro_export]
macro_rules! with_element {
    ($format:expr, $E:ident => $body:expr) => {
        match $format {
            nf4_quant::FloatFormat::F32 => {
                type $E = f32;
                $body
            }
            nf4_quant::FloatFormat::F16 => {
                type $E = half::f16;
                $body
            }
            nf4_quant::FloatFormat::BF16 => {
                type $E = half::bf16;
                $body
            }
        }
    };
}

/// Rounds to a format and widens back.
pub fn round_to(values: &[f32], format: FloatFormat) -> Vec<f32> {
    with_element!(format, E => narrow::<E>(values).iter().map(|v| Element::to_f32(*v)).collect())
}

/// Distance in representable values.
pub fn ulps(a: f32, b: f32) -> u32 {
    let ordered = |v: f32| {
        let bits = v.to_bits() as i32;
        if bits < 0 { i32::MIN.wrapping_sub(bits) } else { bits }
    };
    ordered(a).abs_diff(ordered(b))
}

/// The code of one element of packed codes.
pub fn code_at(codes: &[u8], i: usize) -> u8 {
    if i.is_multiple_of(2) { codes[i / 2] >> 4 } else { codes[i / 2] & 15 }
}

/// Asserts that two slices hold the same bits, naming the first element that does not.
pub fn assert_bits(what: &str, ours: &[f32], theirs: &[f32]) {
    assert_eq!(ours.len(), theirs.len(), "{what}: length");
    let differs = ours.iter().zip(theirs).position(|(a, b)| a.to_bits() != b.to_bits());
    if let Some(i) = differs {
        panic!("{what}: element {i} is {:e}, should be {:e}", ours[i], theirs[i]);
    }
}

/// The problem in f16 where the device multiplies no bf16.
#[cfg(feature = "kernels")]
pub fn on_device(client: &cubecl::client::Client, problem: nf4_quant::matmul::Problem) -> nf4_quant::matmul::Problem {
    if cuda_source::device(client).is_none_or(|device| device.multiplies(problem.format.into())) {
        return problem;
    }
    let half = |format| if format == FloatFormat::BF16 { FloatFormat::F16 } else { format };
    nf4_quant::matmul::Problem { format: half(problem.format), out: half(problem.out), ..problem }
}

/// `NF4_QUANT_EVERY=n` takes every n-th case, for tools that make everything slow, such as compute-sanitizer.
pub fn every() -> usize {
    std::env::var("NF4_QUANT_EVERY").ok().and_then(|n| n.parse().ok()).unwrap_or(1).max(1)
}
