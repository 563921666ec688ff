//! bitsandbytes 4-bit weights in a safetensors checkpoint (version 0.50.2).
//!
//! For a module X: `X.weight` holds the packed codes (bytes, possibly viewed as F16, BF16 or F32 when
//! the file was saved with `bnb_4bit_quant_storage`), `X.weight.absmax` the block statistics (U8 with
//! double quantization, then also `nested_absmax` and `nested_quant_map`), `X.weight.quant_map` the
//! codebook, and `X.weight.quant_state.bitsandbytes__nf4` (or `__fp4`) the scalars as JSON in bytes.

use std::path::Path;

use nf4_quant::{
    Absmax, FloatFormat, Metadata, NestedAbsmax, QuantState, QuantType, Quantized4bit, signed_dynamic_map,
};
use safetensors::Dtype;
use serde_json::Value;

use crate::checkpoint::Checkpoint;
use crate::error::FormatError;
use crate::header::TensorSpec;
use crate::mapped::TensorView;

const STATE: &str = ".weight.quant_state.bitsandbytes__";

/// `quantization_config` of a `config.json`, as bitsandbytes through transformers writes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BnbConfig {
    /// `bnb_4bit_quant_type`.
    pub quant_type: QuantType,
    /// `bnb_4bit_use_double_quant`.
    pub double_quant: bool,
    /// `bnb_4bit_compute_dtype`.
    pub compute_dtype: FloatFormat,
    /// `bnb_4bit_quant_storage`, the data type under which the packed bytes are saved.
    pub quant_storage: String,
    /// `llm_int8_skip_modules`: modules that were left unquantized, beside the output head.
    pub skip_modules: Vec<String>,
}

impl BnbConfig {
    /// Reads the quantization of a parsed `config.json`; `None` when it is none of bitsandbytes to 4 bits. What a file
    /// says is no proof that its tensors are in 4 bits: [`Checkpoint::quantized_modules`] tells.
    ///
    /// # Errors
    /// [`FormatError::Field`], which names `path`, for values that cannot be.
    pub fn from_config(config: &Value, path: &Path) -> Result<Option<Self>, FormatError> {
        let fail = |field: &str, reason: String| FormatError::Field {
            path: path.to_path_buf(),
            field: format!("quantization_config.{field}"),
            reason,
        };
        let quantization = match config.get("quantization_config") {
            None | Some(Value::Null) => return Ok(None),
            Some(Value::Object(map)) => map,
            Some(other) => return Err(fail("", format!("expected an object, found {other}"))),
        };
        let flag = |key: &str| match quantization.get(key) {
            None | Some(Value::Null) => Ok(false),
            Some(Value::Bool(b)) => Ok(*b),
            Some(other) => Err(fail(key, format!("expected true or false, found {other}"))),
        };
        let text = |key: &str, default: &str| match quantization.get(key) {
            None | Some(Value::Null) => Ok(default.to_string()),
            Some(Value::String(s)) => Ok(s.clone()),
            Some(other) => Err(fail(key, format!("expected a string, found {other}"))),
        };
        // Early versions of transformers wrote no method.
        let method = text("quant_method", "bitsandbytes")?;
        if method != "bitsandbytes" || !flag("load_in_4bit")? {
            return Ok(None);
        }
        let skip_modules = match quantization.get("llm_int8_skip_modules") {
            None | Some(Value::Null) => Vec::new(),
            Some(list) => serde_json::from_value(list.clone())
                .map_err(|_| fail("llm_int8_skip_modules", format!("expected a list of names, found {list}")))?,
        };
        // The defaults are BitsAndBytesConfig's.
        let quant_type = text("bnb_4bit_quant_type", "fp4")?;
        let compute_dtype = text("bnb_4bit_compute_dtype", "float32")?;
        Ok(Some(Self {
            quant_type: quant_type.parse().map_err(|e| fail("bnb_4bit_quant_type", format!("{e}")))?,
            double_quant: flag("bnb_4bit_use_double_quant")?,
            compute_dtype: compute_dtype.parse().map_err(|e| fail("bnb_4bit_compute_dtype", format!("{e}")))?,
            quant_storage: text("bnb_4bit_quant_storage", "uint8")?,
            skip_modules,
        }))
    }
}

impl Checkpoint {
    /// The modules whose weight bitsandbytes has quantized to 4 bits, sorted.
    pub fn quantized_modules(&self) -> Vec<&str> {
        self.names().filter_map(|name| name.split_once(STATE).map(|(module, _)| module)).collect()
    }

    /// The 4-bit weight of a module; `None` when its weight is not quantized, or not there.
    ///
    /// # Errors
    /// [`FormatError::QuantState`] when the parts contradict each other or the codebooks are not those
    /// of NF4, FP4 and the 8-bit dynamic map, [`FormatError::MissingTensor`], [`FormatError::Shape`],
    /// [`FormatError::Dtype`], [`FormatError::NotFinite`].
    pub fn quantized(&self, module: &str) -> Result<Option<Quantized4bit>, FormatError> {
        let found = QuantType::ALL.into_iter().find_map(|t| Some((t, self.get(&format!("{module}{STATE}{t}"))?)));
        let Some((quant_type, state)) = found else {
            return self.refuse_other_quantization(module).map(|()| None);
        };
        let bad = |view: &TensorView<'_>, reason: String| FormatError::QuantState {
            file: view.file.to_path_buf(),
            tensor: view.name.to_string(),
            reason,
        };
        if state.dtype != Dtype::U8 {
            return Err(state.wrong_dtype("U8, the bytes of a JSON text"));
        }
        let json = std::str::from_utf8(state.data).map_err(|e| bad(&state, format!("not UTF-8: {e}")))?;
        let metadata = Metadata::parse(json).map_err(|e| bad(&state, e.to_string()))?;
        if metadata.quant_type != quant_type {
            return Err(bad(&state, format!("it says {} inside", metadata.quant_type)));
        }
        let part = |name: &str| self.tensor(&format!("{module}.weight{name}"));
        let weight = part("")?;
        if !matches!(weight.dtype, Dtype::U8 | Dtype::I8 | Dtype::F16 | Dtype::BF16 | Dtype::F32) {
            return Err(weight.wrong_dtype("U8, or another type that 4-bit codes are stored as"));
        }
        let elements = metadata.shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
        // Compared before anything is allocated: the shape is only a claim of the JSON.
        let Some(elements) = elements.filter(|n| *n > 0 && n.div_ceil(2) == weight.data.len()) else {
            let have = weight.data.len();
            return Err(bad(
                &weight,
                format!(
                    "it has {have} bytes of codes, which do not fit the shape {:?} of its quant_state",
                    metadata.shape
                ),
            ));
        };
        let blocks = elements.div_ceil(metadata.blocksize);
        same_codebook(&part(".quant_map")?, quant_type.quant_map())?;
        let absmax = part(".absmax")?;
        absmax.expect_shape(&[blocks])?.expect_finite()?;
        let absmax = match metadata.nested {
            None if absmax.dtype == Dtype::F32 => Absmax::Plain(absmax.to_f32_vec()?),
            None => return Err(absmax.wrong_dtype("F32, since there is no double quantization")),
            Some(nested) => {
                if absmax.dtype != Dtype::U8 {
                    return Err(absmax.wrong_dtype("U8, since there is double quantization"));
                }
                same_codebook(&part(".nested_quant_map")?, signed_dynamic_map())?;
                let statistics = part(".nested_absmax")?;
                statistics.expect_shape(&[blocks.div_ceil(nested.blocksize)])?.expect_finite()?;
                Absmax::Nested(NestedAbsmax {
                    codes: absmax.data.to_vec(),
                    absmax: f32_only(&statistics)?,
                    offset: nested.offset,
                    blocksize: nested.blocksize,
                })
            }
        };
        let Metadata { blocksize, dtype, shape, .. } = metadata;
        let state = QuantState { quant_type, blocksize, dtype, shape, absmax };
        let quantized = Quantized4bit::new(weight.data.to_vec(), state).map_err(|e| bad(&weight, e.to_string()))?;
        Ok(Some(quantized))
    }

    /// Refuses a checkpoint that bitsandbytes quantized, for who is about to quantize it.
    pub(crate) fn refuse_quantized(&self) -> Result<(), FormatError> {
        let of_bnb = |name: &&str| name.contains(STATE) || name.ends_with(".SCB");
        match self.names().find(of_bnb) {
            None => Ok(()),
            Some(name) => Err(FormatError::QuantState {
                file: self.dir().to_path_buf(),
                tensor: name.to_string(),
                reason: "the checkpoint is quantized already; start from the full-precision one".into(),
            }),
        }
    }

    /// Other layouts of bitsandbytes would otherwise be taken for plain weights.
    fn refuse_other_quantization(&self, module: &str) -> Result<(), FormatError> {
        for (suffix, reason) in [
            (".SCB", "the module is quantized to 8 bits (LLM.int8), only 4 bits can be loaded"),
            (".weight.SCB", "the module is quantized to 8 bits (LLM.int8), only 4 bits can be loaded"),
            (".weight.quant_map", "there is a codebook but no quant_state; the checkpoint is incomplete"),
        ] {
            if let Some(view) = self.get(&format!("{module}{suffix}")) {
                return Err(FormatError::QuantState {
                    file: view.file.to_path_buf(),
                    tensor: format!("{module}.weight"),
                    reason: reason.into(),
                });
            }
        }
        Ok(())
    }
}

fn f32_only(view: &TensorView<'_>) -> Result<Vec<f32>, FormatError> {
    if view.dtype == Dtype::F32 { view.to_f32_vec() } else { Err(view.wrong_dtype("F32")) }
}

/// The codes are decoded with our own codebook, so the file's must be the same.
fn same_codebook(view: &TensorView<'_>, ours: &[f32]) -> Result<(), FormatError> {
    view.expect_shape(&[ours.len()])?;
    let theirs = f32_only(view)?;
    match ours.iter().zip(&theirs).position(|(a, b)| a != b) {
        None => Ok(()),
        Some(i) => Err(FormatError::QuantState {
            file: view.file.to_path_buf(),
            tensor: view.name.to_string(),
            reason: format!(
                "entry {i} of the codebook is {}, expected {}; this data type is not supported",
                theirs[i], ours[i]
            ),
        }),
    }
}

/// The tensors that make up a module's 4-bit weight in a checkpoint, with their bytes.
pub fn to_tensors(module: &str, weight: &Quantized4bit) -> Vec<(TensorSpec, Vec<u8>)> {
    let name = |suffix: &str| format!("{module}.weight{suffix}");
    let floats = |suffix: &str, x: &[f32]| {
        (TensorSpec::new(name(suffix), Dtype::F32, &[x.len()]), bytemuck::cast_slice(x).to_vec())
    };
    let bytes = |name: String, shape: &[usize], x: Vec<u8>| (TensorSpec::new(name, Dtype::U8, shape), x);
    let state = &weight.state;
    let json = state.metadata_json().into_bytes();
    let mut tensors = vec![
        bytes(name(""), &[weight.codes.len(), 1], weight.codes.clone()),
        floats(".quant_map", state.quant_type.quant_map()),
        bytes(format!("{module}{STATE}{}", state.quant_type), &[json.len()], json),
    ];
    match &state.absmax {
        Absmax::Plain(absmax) => tensors.push(floats(".absmax", absmax)),
        Absmax::Nested(nested) => {
            tensors.push(bytes(name(".absmax"), &[nested.codes.len()], nested.codes.clone()));
            tensors.push(floats(".nested_absmax", &nested.absmax));
            tensors.push(floats(".nested_quant_map", signed_dynamic_map()));
        }
    }
    tensors
}
