//! Which tensors of a checkpoint are parts of weights in another storage, and whether the parts fit together.
//!
//! Shapes are compared here, before anything is read: decoding then has nothing to refuse but what lies in the
//! numbers.

use std::collections::{BTreeMap, BTreeSet};

use safetensors::Dtype;

use super::coded::{Coded, GridParts, InputMajorParts, Layout, StackedParts};
use super::config::{Configured, Method};
use super::grid::Code;
use super::input_major::Order;
use super::scales::Scales;
use super::stacked::BLOCK;
use crate::checkpoint::Checkpoint;
use crate::error::FormatError;
use crate::mapped::TensorView;

/// Suffixes of a weight's scale.
const SCALES: [&str; 2] = ["_scale_inv", "_scale"];
/// What says how activations and caches were quantized: nothing that a dense model computes with.
const OF_ACTIVATIONS: [&str; 10] = [
    ".input_scale",
    ".activation_scale",
    ".output_scale",
    ".input_global_scale",
    ".input_zero_point",
    ".output_zero_point",
    ".k_scale",
    ".v_scale",
    ".q_scale",
    ".prob_output_scale",
];

/// The weights to decode, by the names of the dense ones, and the tensors that are their parts.
#[derive(Debug, Default)]
pub(crate) struct Found {
    pub coded: BTreeMap<String, Coded>,
    pub parts: BTreeSet<String>,
}

/// Finds them in a checkpoint whose tensors have the names that they are stored under.
///
/// # Errors
/// [`FormatError::Coded`] for parts that are missing or do not fit together; [`FormatError::Field`] for a storage
/// that is not decoded; those of [`Configured::read`].
pub(crate) fn find(checkpoint: &Checkpoint) -> Result<Found, FormatError> {
    let is_bnb = |name: &str| name.contains(".quant_state.bitsandbytes__") || name.ends_with(".SCB");
    if checkpoint.names().any(is_bnb) || !checkpoint.names().any(|name| is_code(checkpoint, name)) {
        return Ok(Found::default());
    }
    // Not read before: plain floats need nothing of it.
    let configured = &Configured::read(checkpoint.dir())?;
    configured.refuse()?;
    let mut finder = Finder { checkpoint, configured, found: Found::default() };
    for name in checkpoint.names() {
        finder.look_at(name)?;
    }
    if !finder.found.coded.is_empty() {
        let unused = |name: &&str| OF_ACTIVATIONS.iter().any(|suffix| name.ends_with(suffix));
        finder.found.parts.extend(checkpoint.names().filter(unused).map(ToString::to_string));
    }
    Ok(finder.found)
}

/// Whether a tensor is none that a dense model has: those are floats, and a few buffers of integers.
fn is_code(checkpoint: &Checkpoint, name: &str) -> bool {
    use Dtype::{BF16, BOOL, F16, F32, F64, I64};
    checkpoint.get(name).is_some_and(|view| ![F32, F16, BF16, F64, I64, BOOL].contains(&view.dtype))
}

struct Finder<'a> {
    checkpoint: &'a Checkpoint,
    configured: &'a Configured,
    found: Found,
}

impl<'a> Finder<'a> {
    fn get(&self, name: &str) -> Option<TensorView<'a>> {
        self.checkpoint.get(name)
    }

    /// The weight that a tensor holds the codes of.
    fn look_at(&mut self, name: &str) -> Result<(), FormatError> {
        let Some(codes) = self.get(name) else { return Ok(()) };
        let is_empty = codes.num_elements() == 0;
        if let Some(module) = name.strip_suffix(".qweight") {
            if is_empty {
                return Err(wrong(&codes, EMPTY.into()));
            }
            return self.input_major(module, &codes);
        }
        if let Some(weight) = name.strip_suffix("_packed") {
            return self.packed(weight, &codes);
        }
        if let Some(weight) = name.strip_suffix("_blocks")
            && codes.dtype == Dtype::U8
        {
            return self.stacked(weight, &codes);
        }
        let code = match codes.dtype {
            Dtype::F8_E4M3 => Code::E4M3,
            Dtype::F8_E5M2 => Code::E5M2,
            Dtype::I8 => Code::I8,
            _ => return Ok(()),
        };
        // Scales are floats of 8 bits themselves in some checkpoints.
        if SCALES.iter().any(|suffix| name.strip_suffix(suffix).is_some_and(|weight| self.is_weight(weight))) {
            return Ok(());
        }
        let scales = SCALES.iter().find_map(|suffix| self.get(&format!("{name}{suffix}")));
        match (scales, code) {
            (Some(_), _) if is_empty => Err(wrong(&codes, EMPTY.into())),
            (Some(scales), _) => self.bytes(name, &codes, &scales, code),
            // Other integers are no weights.
            (None, Code::I8) if !name.ends_with(".weight") => Ok(()),
            (None, _) => Err(wrong(
                &codes,
                format!(
                    "it has no scales: neither `{name}_scale_inv` nor `{name}_scale` is there; download the checkpoint again, it is incomplete"
                ),
            )),
        }
    }

    fn is_weight(&self, name: &str) -> bool {
        self.get(name).is_some() || self.get(&format!("{name}_packed")).is_some()
    }

    fn part(&self, codes: &TensorView<'_>, name: &str) -> Result<TensorView<'a>, FormatError> {
        self.get(name).ok_or_else(|| {
            wrong(codes, format!("its `{name}` is not there; download the checkpoint again, it is incomplete"))
        })
    }

    /// The type that a weight comes in.
    fn dtype(&self, scales: Dtype) -> Dtype {
        match scales {
            Dtype::F16 | Dtype::BF16 => scales,
            _ => self.configured.dtype,
        }
    }

    fn add(&mut self, name: String, shape: Vec<usize>, scales: Dtype, kind: &'static str, layout: Layout) {
        let dtype = self.dtype(scales);
        let coded = Coded { dtype, shape, kind, layout };
        self.found.parts.extend(coded.parts().map(str::to_string));
        self.found.coded.insert(name, coded);
    }

    /// 8-bit floats and integers, and the 4-bit floats that lie in bytes.
    fn bytes(
        &mut self,
        name: &str,
        codes: &TensorView<'_>,
        scales: &TensorView<'_>,
        code: Code,
    ) -> Result<(), FormatError> {
        // DeepSeek's experts are 4-bit floats in bytes.
        let of_fp8 = scales.name.ends_with("_scale_inv");
        let code = if of_fp8 && code == Code::I8 { Code::E2M1 } else { code };
        let mut shape = codes.shape.clone();
        let (Some(columns), true) = (shape.last_mut(), codes.shape.len() >= 2) else {
            return Err(wrong(codes, format!("its shape {:?} is that of no matrix", codes.shape)));
        };
        *columns *= 8 / code.bits();
        let zeros = self.get(&format!("{name}_zero_point")).filter(|_| code == Code::I8);
        if let Some(zeros) = &zeros {
            same(zeros, &scales.shape)?;
            of_type(zeros, Dtype::I8, "I8")?;
        }
        let row_bytes = codes.shape[codes.shape.len() - 1];
        let kind = match (code, scales.dtype) {
            (Code::I8, _) => "INT8",
            (Code::E2M1, _) => "FP4",
            (_, Dtype::U8 | Dtype::F8_E8M0) => "MXFP8",
            _ => "FP8",
        };
        let grid = self.grid(&shape, scales, matches!(code, Code::E2M1))?;
        let parts = GridParts {
            code,
            codes: name.into(),
            row_bytes,
            scales: scales.name.into(),
            divisor: None,
            zeros: zeros.map(|zeros| zeros.name.into()),
            packed_zeros: false,
            groups: None,
            grid,
        };
        self.add(name.into(), shape, scales.dtype, kind, Layout::Grid(parts));
        Ok(())
    }

    /// Integers in words, and 4-bit floats, of compressed-tensors.
    fn packed(&mut self, name: &str, codes: &TensorView<'_>) -> Result<(), FormatError> {
        let scales = self.part(codes, &format!("{name}_scale"))?;
        let &[rows, across] = codes.shape.as_slice() else {
            return Err(wrong(codes, format!("its shape {:?} is that of no matrix", codes.shape)));
        };
        let (code, columns, kind) = match codes.dtype {
            Dtype::U8 => (Code::E2M1, 2 * across, if scales.dtype == Dtype::F8_E4M3 { "NVFP4" } else { "MXFP4" }),
            Dtype::I32 => {
                let shape = self.part(codes, &format!("{name}_shape"))?;
                let sizes = shape.to_i64_vec()?;
                let sizes: Vec<usize> = sizes.iter().filter_map(|n| usize::try_from(*n).ok()).collect();
                let &[_, columns] = sizes.as_slice() else {
                    return Err(wrong(&shape, format!("it holds {sizes:?}; expected rows and columns")));
                };
                let code = match across {
                    _ if sizes[0] != rows => None,
                    _ if across == columns.div_ceil(8) => Some((Code::Offset8, "INT4")),
                    _ if across == columns.div_ceil(4) => Some((Code::Offset128, "INT8")),
                    _ => None,
                };
                let Some((code, kind)) = code else {
                    return Err(wrong(
                        codes,
                        format!(
                            "its shape {:?} holds no {sizes:?} weights of 4 or 8 bits, and other sizes are not decoded; {ORIGINAL}",
                            codes.shape
                        ),
                    ));
                };
                self.found.parts.insert(shape.name.into());
                (code, columns, kind)
            }
            _ => return Err(codes.wrong_dtype("U8 or I32, codes of compressed-tensors")),
        };
        let divisor = self.get(&format!("{name}_global_scale"));
        if let Some(divisor) = &divisor {
            of_type(divisor, Dtype::F32, "F32")?;
            if divisor.num_elements() != 1 {
                return Err(shape_of(divisor, vec![1]));
            }
        }
        if kind == "NVFP4" && divisor.is_none() {
            self.part(codes, &format!("{name}_global_scale"))?;
        }
        let grid = self.grid(&[rows, columns], &scales, true)?;
        let zeros = self.get(&format!("{name}_zero_point"));
        if let Some(zeros) = &zeros {
            of_type(zeros, Dtype::I32, "I32")?;
            same(zeros, &[rows.div_ceil(32 / code.bits()), grid.0[1]])?;
        }
        let groups = self.get(&format!("{name}_g_idx"));
        if let Some(groups) = &groups {
            same(groups, &[columns])?;
        }
        let owned = |view: Option<TensorView<'_>>| view.map(|view| view.name.to_string());
        let parts = GridParts {
            code,
            codes: codes.name.into(),
            row_bytes: across * if codes.dtype == Dtype::I32 { 4 } else { 1 },
            scales: scales.name.into(),
            divisor: owned(divisor),
            zeros: owned(zeros),
            packed_zeros: true,
            groups: owned(groups),
            grid,
        };
        self.add(name.into(), vec![rows, columns], scales.dtype, kind, Layout::Grid(parts));
        Ok(())
    }

    /// The grid of scales over each matrix, and the block of one; `fine` ones have groups in every row.
    fn grid(
        &self,
        shape: &[usize],
        scales: &TensorView<'_>,
        fine: bool,
    ) -> Result<([usize; 2], [usize; 2]), FormatError> {
        let (lead, matrix) = shape.split_at(shape.len() - 2);
        let [rows, columns] = [matrix[0], matrix[1]];
        if rows == 0 || columns == 0 {
            return Err(wrong(scales, "the weight is empty".into()));
        }
        if !Scales::supports(scales.dtype) {
            return Err(scales.wrong_dtype("F32, F16, BF16, F8_E4M3, F8_E8M0 or U8, scales"));
        }
        let whole = ([1, 1], [rows, columns]);
        let own = scales.shape.strip_prefix(lead).unwrap_or(&scales.shape);
        let [down, across] = match own {
            // One for the whole of a weight, or of each in a stack.
            [] | [1] | [1, 1] if lead.is_empty() || own.len() < scales.shape.len() => return Ok(whole),
            &[down] => [down, 1],
            &[down, across] => [down, across],
            _ => [0, 0],
        };
        let (sizes, blocks): (&[usize], Vec<[usize; 2]>) = match &self.configured.method {
            Method::Float8(block) => (&[], block.iter().copied().collect()),
            Method::CompressedTensors { groups, blocks } => (groups, blocks.clone()),
            _ => (&[], Vec::new()),
        };
        // In rows: all of one, groups of a known size, or of one that divides.
        let rows_alike = down == rows && across > 0;
        let size = sizes.iter().copied().find(|size| columns.div_ceil(*size) == across);
        let divides = || (columns.is_multiple_of(across)).then(|| columns / across);
        let by_blocks = blocks.iter().find(|[r, c]| [rows.div_ceil(*r), columns.div_ceil(*c)] == [down, across]);
        if let Some(block) = by_blocks.filter(|_| !fine) {
            return Ok(([down, across], *block));
        }
        if rows_alike && let Some(size) = size.or_else(divides) {
            return Ok(([down, across], [1, size]));
        }
        // Blocks that nothing is said of divide, as in transformers.
        if blocks.is_empty() && !fine && [down, across].iter().all(|n| *n > 0) {
            let [r, c] = [rows / down, columns / across];
            if r * down == rows && c * across == columns {
                return Ok(([down, across], [r, c]));
            }
        }
        let expected = match blocks.first() {
            Some([r, c]) if !fine => vec![rows.div_ceil(*r), columns.div_ceil(*c)],
            _ => vec![rows, sizes.first().map_or(1, |size| columns.div_ceil(*size))],
        };
        Err(shape_of(scales, [lead, &expected].concat()))
    }

    /// gpt-oss's stacks.
    fn stacked(&mut self, name: &str, codes: &TensorView<'_>) -> Result<(), FormatError> {
        let scales = self.part(codes, &format!("{name}_scales"))?;
        let &[experts, outputs, blocks, bytes] = codes.shape.as_slice() else {
            return Err(wrong(codes, format!("its shape {:?} is not [experts, outputs, blocks, 16]", codes.shape)));
        };
        if bytes != BLOCK / 2 || blocks == 0 || outputs == 0 {
            return Err(shape_of(codes, vec![experts, outputs, blocks, BLOCK / 2]));
        }
        same(&scales, &[experts, outputs, blocks])?;
        of_type(&scales, Dtype::U8, "U8")?;
        let parts = StackedParts { codes: codes.name.into(), scales: scales.name.into(), blocks, outputs };
        self.add(name.into(), vec![experts, blocks * BLOCK, outputs], scales.dtype, "MXFP4", Layout::Stacked(parts));
        Ok(())
    }

    /// GPTQ's and AWQ's.
    fn input_major(&mut self, module: &str, codes: &TensorView<'_>) -> Result<(), FormatError> {
        let [zeros, scales] = ["qzeros", "scales"].map(|part| self.part(codes, &format!("{module}.{part}")));
        let (zeros, scales) = (zeros?, scales?);
        of_type(codes, Dtype::I32, "I32")?;
        of_type(&zeros, Dtype::I32, "I32")?;
        if ![Dtype::F16, Dtype::BF16, Dtype::F32].contains(&scales.dtype) {
            return Err(scales.wrong_dtype("F16, BF16 or F32, scales"));
        }
        let (&[down, across], &[groups, outputs], &[_, zeros_across]) =
            (codes.shape.as_slice(), scales.shape.as_slice(), zeros.shape.as_slice())
        else {
            return Err(wrong(
                codes,
                format!(
                    "{:?}, scales {:?} and zero points {:?} must be matrices",
                    codes.shape, scales.shape, zeros.shape
                ),
            ));
        };
        let is_awq = match self.configured.method {
            Method::Awq { .. } => true,
            Method::Gptq { .. } => false,
            _ => across != outputs,
        };
        let (order, inputs, kind) = match is_awq {
            true => (Order::Outputs, down, "AWQ"),
            // The zero points say how many bits there are: `dynamic` may give modules their own.
            false if zeros_across == outputs.div_ceil(8) => (Order::Inputs(4), down * 8, "GPTQ"),
            false if zeros_across == outputs.div_ceil(4) => (Order::Inputs(8), down * 4, "GPTQ"),
            false => {
                return Err(wrong(
                    codes,
                    format!(
                        "its zero points {:?} are not those of {outputs} outputs in 4 or 8 bits, and others are not decoded; {ORIGINAL}",
                        zeros.shape
                    ),
                ));
            }
        };
        let expected = if is_awq { vec![inputs, outputs / 8] } else { vec![down, outputs] };
        if groups == 0 || inputs == 0 || codes.shape != expected || (is_awq && !outputs.is_multiple_of(8)) {
            return Err(shape_of(codes, expected));
        }
        let each = if order == Order::Inputs(8) { 4 } else { 8 };
        same(&zeros, &[groups, outputs.div_ceil(each)])?;
        let places = self.get(&format!("{module}.g_idx")).filter(|_| !is_awq);
        if let Some(places) = &places {
            same(places, &[inputs])?;
        }
        let (said, add, free) = match self.configured.method {
            Method::Gptq { group, add, dynamic } => (group, add, dynamic),
            Method::Awq { group } => (group, 0, false),
            // Nothing is said: what most have.
            _ => (None, u32::from(!is_awq), true),
        };
        let group = match said.filter(|size| !free || inputs.div_ceil(*size) == groups) {
            Some(size) => size,
            None if inputs.is_multiple_of(groups) => inputs / groups,
            None => {
                return Err(wrong(&scales, format!("its {groups} groups do not divide {inputs} inputs; {ORIGINAL}")));
            }
        };
        if inputs.div_ceil(group) != groups {
            return Err(shape_of(&scales, vec![inputs.div_ceil(group), outputs]));
        }
        let parts = InputMajorParts {
            order,
            codes: codes.name.into(),
            zeros: zeros.name.into(),
            add,
            scales: scales.name.into(),
            outputs,
            group,
            places: places.map(|view| view.name.into()),
        };
        if is_awq || parts.places.is_none() {
            // One that counts up in order is written by some and says nothing.
            let extra = format!("{module}.g_idx");
            self.found.parts.extend(self.get(&extra).map(|view| view.name.to_string()));
        }
        self.add(format!("{module}.weight"), vec![outputs, inputs], scales.dtype, kind, Layout::InputMajor(parts));
        Ok(())
    }
}

/// What has nothing to decode.
const EMPTY: &str = "it is empty; download the file again";
/// What to do about what is not decoded.
const ORIGINAL: &str = "use the original checkpoint";

fn wrong(view: &TensorView<'_>, reason: String) -> FormatError {
    FormatError::Coded { file: view.file.to_path_buf(), tensor: view.name.to_string(), reason }
}

fn shape_of(view: &TensorView<'_>, expected: Vec<usize>) -> FormatError {
    let hint = "config.json's quantization_config and the weights do not belong together, or the file is damaged: download both again";
    wrong(view, format!("its shape is {:?}, expected {expected:?}; {hint}", view.shape))
}

fn same(view: &TensorView<'_>, expected: &[usize]) -> Result<(), FormatError> {
    if view.shape == expected { Ok(()) } else { Err(shape_of(view, expected.to_vec())) }
}

fn of_type(view: &TensorView<'_>, dtype: Dtype, name: &'static str) -> Result<(), FormatError> {
    if view.dtype == dtype { Ok(()) } else { Err(view.wrong_dtype(name)) }
}
