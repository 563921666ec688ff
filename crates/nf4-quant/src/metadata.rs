//! bitsandbytes' quant_state JSON, the `X.weight.quant_state.bitsandbytes__nf4` tensor of a checkpoint.
//!
//! Python's `json.dumps` wrote it, so the text has its separators, its key order and its floats.

use std::fmt::Write;

use serde_json::{Map, Value};

use crate::{FloatFormat, QuantError, QuantType, python_float};

/// The scalars of a quantized weight, without its statistics.
#[derive(Debug, Clone, PartialEq)]
pub struct Metadata {
    /// Codebook.
    pub quant_type: QuantType,
    /// Elements per block.
    pub blocksize: usize,
    /// The weight's dtype before quantization.
    pub dtype: FloatFormat,
    /// The weight's shape.
    pub shape: Vec<usize>,
    /// Present with double quantization.
    pub nested: Option<NestedMetadata>,
}

/// The scalars of double quantization.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NestedMetadata {
    /// Codes per nested block.
    pub blocksize: usize,
    /// Mean of the absmax.
    pub offset: f32,
}

impl Metadata {
    /// The JSON text, byte for byte as bitsandbytes writes it.
    pub fn to_json(&self) -> String {
        let shape: Vec<String> = self.shape.iter().map(usize::to_string).collect();
        let mut json = format!(
            r#"{{"quant_type": "{}", "blocksize": {}, "dtype": "{}", "shape": [{}]"#,
            self.quant_type,
            self.blocksize,
            self.dtype,
            shape.join(", ")
        );
        if let Some(nested) = self.nested {
            // Writing to a String can't fail.
            let _ = write!(
                json,
                r#", "nested_blocksize": {}, "nested_dtype": "float32", "nested_offset": {}"#,
                nested.blocksize,
                python_float(f64::from(nested.offset))
            );
        }
        json.push('}');
        json
    }

    /// Reads the JSON text. Keys may come in any order; unknown ones are ignored.
    ///
    /// # Errors
    ///
    /// [`QuantError::Metadata`] naming the field; unknown names as [`QuantError::UnknownQuantType`] or
    /// [`QuantError::UnknownDtype`]; [`QuantError::Blocksize`] and [`QuantError::NestedBlocksize`].
    pub fn parse(json: &str) -> Result<Self, QuantError> {
        let fields: Map<String, Value> = serde_json::from_str(json)
            .map_err(|e| QuantError::Metadata { field: "(document)", problem: format!("is not a JSON object: {e}") })?;
        let nested_fields = ["nested_blocksize", "nested_dtype", "nested_offset"];
        let nested = if nested_fields.iter().any(|f| fields.contains_key(*f)) {
            let dtype = text(&fields, "nested_dtype")?;
            if dtype.parse() != Ok(FloatFormat::F32) {
                return Err(problem("nested_dtype", format!("is `{dtype}`: only float32 is known")));
            }
            let offset = field(&fields, "nested_offset")?;
            let offset =
                offset.as_f64().ok_or_else(|| problem("nested_offset", format!("is {offset}, not a number")))?;
            let blocksize = unsigned(&fields, "nested_blocksize")?;
            if blocksize == 0 {
                return Err(QuantError::NestedBlocksize);
            }
            Some(NestedMetadata { blocksize, offset: offset as f32 })
        } else {
            None
        };
        let shape = field(&fields, "shape")?;
        let shape = shape
            .as_array()
            .and_then(|dims| dims.iter().map(|d| usize::try_from(d.as_u64()?).ok()).collect())
            .ok_or_else(|| problem("shape", format!("is {shape}, not a list of sizes")))?;
        let metadata = Self {
            quant_type: text(&fields, "quant_type")?.parse()?,
            blocksize: unsigned(&fields, "blocksize")?,
            dtype: text(&fields, "dtype")?.parse()?,
            shape,
            nested,
        };
        crate::blocks::check_blocksize(metadata.blocksize)?;
        Ok(metadata)
    }
}

fn problem(field: &'static str, problem: String) -> QuantError {
    QuantError::Metadata { field, problem }
}

fn field<'a>(fields: &'a Map<String, Value>, name: &'static str) -> Result<&'a Value, QuantError> {
    fields.get(name).ok_or_else(|| problem(name, "is missing".into()))
}

fn text<'a>(fields: &'a Map<String, Value>, name: &'static str) -> Result<&'a str, QuantError> {
    let value = field(fields, name)?;
    value.as_str().ok_or_else(|| problem(name, format!("is {value}, not a string")))
}

fn unsigned(fields: &Map<String, Value>, name: &'static str) -> Result<usize, QuantError> {
    let value = field(fields, name)?;
    let number = value.as_u64().and_then(|n| usize::try_from(n).ok());
    number.ok_or_else(|| problem(name, format!("is {value}, not a non-negative integer")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_reads_back() -> Result<(), QuantError> {
        let nested = NestedMetadata { blocksize: 256, offset: 3.25e-6 };
        for nested in [None, Some(nested)] {
            let metadata = Metadata {
                quant_type: QuantType::Fp4,
                blocksize: 128,
                dtype: FloatFormat::F16,
                shape: vec![3, 5],
                nested,
            };
            assert_eq!(Metadata::parse(&metadata.to_json())?, metadata);
        }
        Ok(())
    }

    #[test]
    fn what_is_wrong_is_named() {
        let good = r#"{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [2, 3], "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}"#;
        assert!(Metadata::parse(good).is_ok());
        for (from, to, message) in [
            ("{", "[", "(document)"),
            ("\"nf4\"", "\"int4\"", "`int4`"),
            ("\"quant_type\"", "\"kind\"", "`quant_type` is missing"),
            ("64", "\"64\"", "`blocksize` is \"64\""),
            ("64", "60", "blocksize 60"),
            ("\"bfloat16\"", "\"int8\"", "`int8`"),
            ("[2, 3]", "[2, -3]", "`shape` is [2,-3]"),
            ("256", "0", "nested_blocksize is 0"),
            ("\"float32\"", "\"float16\"", "`nested_dtype` is `float16`"),
            ("0.5", "\"x\"", "`nested_offset` is \"x\""),
            (", \"nested_offset\": 0.5", "", "`nested_offset` is missing"),
        ] {
            let error = Metadata::parse(&good.replacen(from, to, 1)).expect_err(to).to_string();
            assert!(error.contains(message), "{error} should contain {message}");
        }
    }
}
