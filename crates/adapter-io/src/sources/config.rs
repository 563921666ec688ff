//! What `config.json` says of a checkpoint's storage, and which storages are refused by name.
//!
//! `quantization_config` (in the file, in its `text_config`, or `compression_config` of older writers), or
//! `quantize_config.json` and `quant_config.json` beside it, where GPTQ's and AWQ's first programs put the same.

use std::path::{Path, PathBuf};

use safetensors::Dtype;
use serde_json::{Map, Value};

use crate::error::FormatError;
use crate::json;
use crate::paths::resolve_inside;

/// What was done to the weights.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Method {
    /// Nothing is said.
    Unsaid,
    /// bitsandbytes, which is read as it is ([`crate::bnb`]).
    BitsAndBytes,
    /// Floats of 8 bits (`fp8`, `mxfp8`), in blocks of so many rows and columns.
    Float8(Option<[usize; 2]>),
    /// gpt-oss's floats of 4 bits.
    Mxfp4,
    /// compressed-tensors: the groups' sizes and blocks.
    CompressedTensors { groups: Vec<usize>, blocks: Vec<[usize; 2]> },
    /// GPTQ: inputs that share a scale, if not all, and what is added to stored zero points.
    Gptq { group: Option<usize>, add: u32, dynamic: bool },
    /// AWQ: inputs that share a scale, if not all.
    Awq { group: Option<usize> },
    /// One that is not decoded.
    Refused { field: &'static str, reason: String },
}

/// What stands in the configuration.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Configured {
    /// The file that says so.
    pub path: PathBuf,
    /// The model's own type, for weights whose scales have none.
    pub dtype: Dtype,
    pub method: Method,
}

/// The methods whose weights are not decoded, and what they would take.
const NOT_DECODED: [(&str, &str); 20] = [
    ("hqq", "its zero points are floats, and its groups cross rows as each layer's metadata says"),
    ("eetq", "its codes lie in the order of a GPU's instructions"),
    ("quanto", "its packing is that of one program's tensors"),
    ("vptq", "its weights are indices into codebooks of vectors"),
    ("aqlm", "its weights are sums of vectors of learned codebooks"),
    ("spqr", "its weights are two-level codes with outliers beside them"),
    ("higgs", "its weights are rotated and lie on grids of several dimensions"),
    ("fp_quant", "its weights are rotated"),
    ("quip", "its weights are rotated and lie on a lattice"),
    ("torchao", "its weights are tensors of several kinds that a program pickles"),
    ("bitnet", "its ternary weights belong to activations of 8 bits, which were trained with them"),
    ("fbgemm_fp8", "its scales belong to one program's kernels"),
    ("exl2", "each group of columns has its own number of bits"),
    ("exl3", "its weights are trellis codes"),
    ("quark", "its files have several layouts"),
    ("modelopt", "its files have several layouts"),
    ("sinq", "its weights have scales in both directions"),
    ("metal", "it is made for one system's kernels"),
    ("fouroversix", "its blocks choose between two scales"),
    ("gguf", "it is a GGUF file's"),
];
/// What to do instead.
const INSTEAD: &str =
    "use the original checkpoint in 16 bits, or one in FP8, MXFP4, NVFP4, AWQ, GPTQ or bitsandbytes' 4 bits";

impl Configured {
    /// Reads what lies beside a checkpoint; without a `config.json` nothing is said.
    ///
    /// # Errors
    /// [`FormatError::Read`], [`FormatError::Json`], [`FormatError::UnsafePath`]; [`FormatError::Field`] for values
    /// that can't be.
    pub(crate) fn read(dir: &Path) -> Result<Self, FormatError> {
        type Object = (PathBuf, Map<String, Value>);
        let file = |name: &str| -> Result<Option<Object>, FormatError> {
            let path = resolve_inside(dir, name, dir)?;
            path.map(|path| Ok((path.clone(), json::read(&path)?))).transpose()
        };
        let config = file(crate::convert::CONFIG_FILE)?;
        let Some((path, config)) = config else {
            return Ok(Self { path: dir.into(), dtype: Dtype::BF16, method: Method::Unsaid });
        };
        let section = config.get("text_config").and_then(Value::as_object);
        let find = |key: &str| {
            let known = |value: &&Value| !value.is_null();
            config.get(key).filter(known).or_else(|| section?.get(key).filter(known))
        };
        let dtype = find("dtype").or_else(|| find("torch_dtype")).and_then(Value::as_str);
        let dtype = match dtype.map(|name| name.trim_start_matches("torch.")) {
            Some("float16" | "half") => Dtype::F16,
            Some("float32" | "float") => Dtype::F32,
            _ => Dtype::BF16,
        };
        if let Some(said) = find("quantization_config").or_else(|| find("compression_config")) {
            let method = method(said, None).map_err(|(field, reason)| {
                let field = format!("quantization_config.{field}");
                FormatError::Field { path: path.clone(), field, reason }
            })?;
            return Ok(Self { path, dtype, method });
        }
        for (name, of) in [("quantize_config.json", "gptq"), ("quant_config.json", "awq")] {
            if let Some((path, said)) = file(name)? {
                let method = method(&Value::Object(said), Some(of)).map_err(|(field, reason)| FormatError::Field {
                    path: path.clone(),
                    field: field.into(),
                    reason,
                })?;
                return Ok(Self { path, dtype, method });
            }
        }
        Ok(Self { path, dtype, method: Method::Unsaid })
    }

    /// The error of weights that are in another storage than floats, where that is not decoded.
    pub(crate) fn refuse(&self) -> Result<(), FormatError> {
        match &self.method {
            Method::Refused { field, reason } => Err(FormatError::Field {
                path: self.path.clone(),
                field: format!("quantization_config.{field}"),
                reason: reason.clone(),
            }),
            _ => Ok(()),
        }
    }
}

type Wrong = (&'static str, String);

fn refused(field: &'static str, what: &str, why: &str) -> Method {
    Method::Refused { field, reason: format!("`{what}` is not decoded: {why}; {INSTEAD}") }
}

/// The method of a `quantization_config`; older files name none.
fn method(said: &Value, otherwise: Option<&str>) -> Result<Method, Wrong> {
    let Some(said) = said.as_object() else { return Err(("", format!("expected an object, found {said}"))) };
    let text = |key: &str| said.get(key).and_then(Value::as_str);
    let by_keys = || match ["load_in_4bit", "load_in_8bit"].iter().any(|key| said.contains_key(*key)) {
        true => Some("bitsandbytes"),
        false => said.contains_key("config_groups").then_some("compressed-tensors"),
    };
    let Some(name) = text("quant_method").or(otherwise).or_else(by_keys) else {
        return Ok(refused("quant_method", "(none)", "it names no method"));
    };
    Ok(match name.to_ascii_lowercase().as_str() {
        "bitsandbytes" | "bitsandbytes_4bit" | "bitsandbytes_8bit" => Method::BitsAndBytes,
        "fp8" | "mxfp8" => Method::Float8(block(said.get("weight_block_size"), "weight_block_size")?),
        "mxfp4" => Method::Mxfp4,
        "compressed-tensors" | "compressed_tensors" => compressed_tensors(said)?,
        "gptq" => gptq(said)?,
        "awq" => awq(said)?,
        "auto-round" | "auto_round" | "intel/auto-round" => auto_round(said)?,
        other => match NOT_DECODED.iter().find(|(method, _)| *method == other) {
            Some((_, why)) => refused("quant_method", name, why),
            None => refused("quant_method", name, "this method is not known"),
        },
    })
}

/// Rows and columns of a block.
fn block(value: Option<&Value>, field: &'static str) -> Result<Option<[usize; 2]>, Wrong> {
    let Some(value) = value.filter(|value| !value.is_null()) else { return Ok(None) };
    let sizes = value.as_array().map(|list| list.iter().map(size).collect::<Option<Vec<_>>>());
    match sizes.flatten().as_deref() {
        Some(&[rows, columns]) => Ok(Some([rows, columns])),
        _ => Err((field, format!("it is {value}; expected two sizes, [128, 128] as a rule"))),
    }
}

fn size(value: &Value) -> Option<usize> {
    value.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| *n > 0)
}

/// `group_size`: -1 is all inputs.
fn group(said: &Map<String, Value>, key: &'static str) -> Result<Option<usize>, Wrong> {
    match said.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) if value.as_i64() == Some(-1) => Ok(None),
        Some(value) => match size(value) {
            Some(n) => Ok(Some(n)),
            None => Err((key, format!("it is {value}; expected the inputs that share a scale, or -1 for all"))),
        },
    }
}

fn compressed_tensors(said: &Map<String, Value>) -> Result<Method, Wrong> {
    let is_some = |key: &str| {
        said.get(key).is_some_and(|value| match value {
            Value::Null => false,
            Value::Object(map) => !map.is_empty(),
            _ => true,
        })
    };
    if is_some("transform_config") {
        return Ok(refused("transform_config", "transform_config", "the weights are rotated"));
    }
    let sparsity = said.get("sparsity_config").and_then(|sparsity| sparsity.get("format")).and_then(Value::as_str);
    if let Some(format) = sparsity.filter(|format| *format != "dense") {
        return Ok(refused("sparsity_config.format", format, "zeros are left out of the weights"));
    }
    let schemes: Vec<&Value> =
        said.get("config_groups").and_then(Value::as_object).into_iter().flat_map(Map::values).collect();
    let formats = said.get("format").into_iter().chain(schemes.iter().filter_map(|scheme| scheme.get("format")));
    const KNOWN: [&str; 9] = [
        "dense",
        "mixed-precision",
        "float-quantized",
        "int-quantized",
        "naive-quantized",
        "pack-quantized",
        "mxfp4-pack-quantized",
        "nvfp4-pack-quantized",
        "mxfp8-quantized",
    ];
    if let Some(format) = formats.filter_map(Value::as_str).find(|format| !KNOWN.contains(format)) {
        return Ok(refused("format", format, "this layout of compressed-tensors is not known here"));
    }
    let (mut groups, mut blocks) = (Vec::new(), Vec::new());
    for weights in schemes.iter().filter_map(|scheme| scheme.get("weights")?.as_object()) {
        groups.extend(group(weights, "group_size")?);
        blocks.extend(block(weights.get("block_structure"), "block_structure")?);
    }
    Ok(Method::CompressedTensors { groups, blocks })
}

/// Why bits can't be decoded.
fn bits(said: &Map<String, Value>, keys: [&'static str; 2], known: &[u64]) -> Option<Method> {
    let (key, value) = keys.iter().find_map(|key| Some((*key, said.get(*key)?)))?;
    match value.as_u64().is_some_and(|bits| known.contains(&bits)) {
        true => None,
        false => Some(refused(key, &value.to_string(), "only 4 and 8 bits are, 4 of AWQ")),
    }
}

fn gptq(said: &Map<String, Value>) -> Result<Method, Wrong> {
    if let Some(refused) = bits(said, ["bits", "w_bit"], &[4, 8]) {
        return Ok(refused);
    }
    let text = |key: &str| said.get(key).and_then(Value::as_str);
    let marlin = said.get("is_marlin_format").and_then(Value::as_bool) == Some(true);
    let format = text("checkpoint_format").or(text("format")).unwrap_or(if marlin { "marlin" } else { "gptq" });
    let add = match format {
        "gptq" => 1,
        "gptq_v2" => 0,
        other => {
            let why = "its codes lie in the order of one program's kernels";
            return Ok(refused("checkpoint_format", other, why));
        }
    };
    match said.get("desc_act") {
        None | Some(Value::Null | Value::Bool(_)) => {}
        Some(other) => return Err(("desc_act", format!("it is {other}; expected true or false"))),
    }
    let dynamic = said.get("dynamic").and_then(Value::as_object).is_some_and(|map| !map.is_empty());
    Ok(Method::Gptq { group: group(said, "group_size")?, add, dynamic })
}

fn awq(said: &Map<String, Value>) -> Result<Method, Wrong> {
    if let Some(refused) = bits(said, ["bits", "w_bit"], &[4]) {
        return Ok(refused);
    }
    let text = |key: &str| said.get(key).and_then(Value::as_str).map(str::to_ascii_lowercase);
    let version = text("version").or_else(|| text("format")).unwrap_or_else(|| "gemm".into());
    if version != "gemm" || text("backend").is_some_and(|backend| backend == "llm-awq") {
        let why = "its codes lie in another order than those of `gemm`";
        return Ok(refused("version", &version, why));
    }
    let key = if said.contains_key("q_group_size") { "q_group_size" } else { "group_size" };
    Ok(Method::Awq { group: group(said, key)? })
}

/// Those of auto-round's that are GPTQ's or AWQ's by the letter.
fn auto_round(said: &Map<String, Value>) -> Result<Method, Wrong> {
    let text = |key: &str| said.get(key).and_then(Value::as_str);
    match text("packing_format").or(text("backend")).unwrap_or("auto_round") {
        "auto_round:auto_gptq" | "auto_gptq" | "gptq" => gptq(said),
        "auto_round:auto_awq" | "auto_awq" | "awq" => awq(said),
        other => Ok(refused("packing_format", other, "of auto-round's layouts only auto_gptq and auto_awq are")),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failing unwrap is a failing test")]

    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_said_is_read() {
        let of = |said: Value| method(&said, None).unwrap();
        assert_eq!(of(json!({"quant_method": "fp8", "weight_block_size": [128, 64]})), Method::Float8(Some([128, 64])));
        assert_eq!(of(json!({"quant_method": "fp8", "weight_block_size": null})), Method::Float8(None));
        let gptq = |group, add, dynamic| Method::Gptq { group, add, dynamic };
        assert_eq!(of(json!({"quant_method": "gptq", "bits": 4, "group_size": 128})), gptq(Some(128), 1, false));
        let v2 = json!({"quant_method": "gptq", "bits": 8, "group_size": -1, "checkpoint_format": "gptq_v2", "dynamic": {"-:a": {}}});
        assert_eq!(of(v2), gptq(None, 0, true));
        let round = json!({"quant_method": "auto-round", "bits": 4, "group_size": 32, "packing_format": "auto_round:auto_gptq"});
        assert_eq!(of(round), gptq(Some(32), 1, false));
        let old = json!({"zero_point": true, "q_group_size": 64, "w_bit": 4, "version": "GEMM"});
        assert_eq!(method(&old, Some("awq")).unwrap(), Method::Awq { group: Some(64) });
        let groups = json!({"a": {"weights": {"group_size": 16}}, "b": {"weights": {"block_structure": [128, 128]}}});
        let said = json!({"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": groups});
        assert_eq!(of(said), Method::CompressedTensors { groups: vec![16], blocks: vec![[128, 128]] });
        assert_eq!(of(json!({"load_in_4bit": true})), Method::BitsAndBytes);
    }

    #[test]
    fn what_is_not_decoded_is_refused_by_name() {
        let mut cases: Vec<(Value, &str)> =
            NOT_DECODED.iter().map(|(name, _)| (json!({"quant_method": name}), *name)).collect();
        cases.extend([
            (json!({"quant_method": "gptq", "bits": 3}), "`3`"),
            (json!({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}), "marlin"),
            (json!({"quant_method": "gptq", "bits": 4, "is_marlin_format": true}), "marlin"),
            (json!({"quant_method": "awq", "bits": 4, "version": "gemv"}), "gemv"),
            (json!({"quant_method": "awq", "bits": 8}), "`8`"),
            (json!({"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:exllamav2"}), "exllamav2"),
            (json!({"quant_method": "compressed-tensors", "format": "marlin-24"}), "marlin-24"),
            (
                json!({"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-bitmask"}}),
                "sparse-bitmask",
            ),
            (json!({"quant_method": "compressed-tensors", "transform_config": {"config_groups": {}}}), "rotated"),
            (json!({"quant_method": "of tomorrow"}), "of tomorrow"),
            (json!({}), "no method"),
        ]);
        for (said, part) in cases {
            let Method::Refused { reason, .. } = method(&said, None).unwrap() else { panic!("{said}") };
            assert!(reason.contains(part) && reason.contains("original checkpoint"), "{said}: {reason}");
        }
        for (said, field) in [
            (json!({"quant_method": "gptq", "bits": 4, "group_size": 0}), "group_size"),
            (json!({"quant_method": "gptq", "bits": 4, "desc_act": "auto"}), "desc_act"),
            (json!({"quant_method": "fp8", "weight_block_size": 128}), "weight_block_size"),
            (json!([]), ""),
        ] {
            assert_eq!(method(&said, None).unwrap_err().0, field, "{said}");
        }
    }
}
