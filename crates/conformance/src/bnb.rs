//! Section `bnb`: bitsandbytes' 4-bit quantization (`bnb/quantize_4bit.*`), its 8-bit map
//! (`bnb/quantize_blockwise.safetensors`) and its 4-bit matmul (`bnb/matmul_4bit.safetensors`).
//!
//! Codes, statistics and dequantized values are compared exactly: errors count the entries that
//! differ. Two things may differ, and are judged separately:
//!
//! - FP4 codes of f32 and f16 elements on a decision threshold. bitsandbytes' reciprocal of absmax is
//!   approximate on CUDA; the codec follows it where absmax is a bf16 value. Elsewhere an element within
//!   2 units in the last place of a threshold falls on either side: only codes that differ away from
//!   thresholds count, ties are noted. Of bf16 weights every code counts.
//! - The offset of double quantization, a mean in f32, depends on the order of summation: 1 unit in
//!   the last place. The 8-bit statistics are compared given the recorded offset.

use anyhow::{Context, Result, bail};
use burn::backend::DispatchDevice;
use burn::tensor::{DType, Device, FloatDType, Tensor, TensorData};
use burn_qlora::adapter_io::{Checkpoint, Floats, TensorView};
use burn_qlora::nf4_quant::kernels::{self, DeviceWeight};
use burn_qlora::nf4_quant::{
    Absmax, Element, FloatFormat, NestedAbsmax, QuantConfig, QuantState, QuantType, Quantized4bit, signed_dynamic_map,
};
use burn_qlora::qlora_layers::Linear4bit;
use serde::Deserialize;

use crate::compare::{count_different, count_different_bits, max_abs, max_abs_diff, to_vec, ulps};
use crate::reference::dims;
use crate::{Reference, Report};

const QUANTIZE_4BIT: &str = "bnb/quantize_4bit.safetensors";
const QUANTIZATIONS: &str = "bnb/quantize_4bit.json";
const BLOCKWISE: &str = "bnb/quantize_blockwise.safetensors";
const MATMUL_4BIT: &str = "bnb/matmul_4bit.safetensors";

/// bitsandbytes' thresholds on the magnitude of FP4 values.
#[allow(clippy::excessive_precision)]
const FP4_THRESHOLDS: [f32; 7] = [0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333];

/// Compares everything recorded of bitsandbytes' quantization.
///
/// # Errors
/// A file cannot be read, or a device fails.
pub fn cases(reference: &Reference, device: &Device, report: &mut Report) -> Result<()> {
    type Part = fn(&Checkpoint, &Device, &mut Report) -> Result<()>;
    let parts: [(&str, Part); 2] = [(BLOCKWISE, blockwise), (MATMUL_4BIT, matmul_4bit)];
    match reference.find(QUANTIZE_4BIT) {
        Some(_) => {
            let recorded = reference.json::<Vec<Recorded>>(QUANTIZATIONS)?;
            quantize_4bit(&reference.tensors(QUANTIZE_4BIT)?, &recorded, device, report)?;
        }
        None => report.skip("bnb", format!("no {QUANTIZE_4BIT}")),
    }
    for (file, part) in parts {
        match reference.find(file) {
            Some(_) => part(&reference.tensors(file)?, device, report)?,
            None => report.skip("bnb", format!("no {file}")),
        }
    }
    Ok(())
}

/// What is recorded of a quantization beside its tensors.
#[derive(Deserialize)]
struct Recorded {
    /// What its tensors' names begin with, with a dot at the end.
    prefix: String,
    /// The tensor that was quantized, where another case has it.
    input: Option<String>,
}

fn quantize_4bit(file: &Checkpoint, recorded: &[Recorded], device: &Device, report: &mut Report) -> Result<()> {
    let modules: Vec<&str> = file.quantized_modules();
    if modules.is_empty() {
        bail!("{QUANTIZE_4BIT} holds no quantized weight");
    }
    for module in modules {
        let theirs = file.quantized(module)?.with_context(|| format!("{module}: no quant_state"))?;
        let shared = recorded.iter().find(|case| case.prefix.strip_suffix('.') == Some(module));
        let input = match shared.and_then(|case| case.input.as_deref()) {
            Some(shared) => file.tensor(shared)?,
            None => file.tensor(&format!("{module}.input"))?,
        };
        let dequantized = file.tensor(&format!("{module}.dequantized"))?;
        let state = &theirs.state;
        let dq = if matches!(state.absmax, Absmax::Nested(_)) { " dq" } else { "" };
        let subject =
            format!("bnb {module} {} {}{dq} {} {:?}", state.quant_type, state.blocksize, state.dtype, state.shape);
        let json = file.tensor(&format!("{module}.weight.quant_state.bitsandbytes__{}", state.quant_type))?.data;
        let case = Case { theirs, input, dequantized, json, subject };
        match case.input.floats()? {
            Floats::F32(values) => case.compare(&values, device, report)?,
            Floats::F16(values) => case.compare(&values, device, report)?,
            Floats::BF16(values) => case.compare(&values, device, report)?,
        }
    }
    Ok(())
}

/// One recorded quantization.
struct Case<'a> {
    theirs: Quantized4bit,
    input: TensorView<'a>,
    dequantized: TensorView<'a>,
    /// quant_state, as recorded.
    json: &'a [u8],
    subject: String,
}

impl Case<'_> {
    fn compare<E: Element>(&self, input: &[E], device: &Device, report: &mut Report) -> Result<()> {
        let Self { theirs, dequantized, subject, .. } = self;
        let QuantState { quant_type, blocksize, ref shape, ref absmax, .. } = theirs.state;
        let expected = dequantized.to_f32_vec()?;
        let config = QuantConfig { quant_type, blocksize, double_quant: matches!(absmax, Absmax::Nested(_)) };

        let host = Quantized4bit::quantize(input, shape, &config)?;
        let plain = Quantized4bit::quantize(input, shape, &QuantConfig { double_quant: false, ..config })?;
        self.compare_quantized(input, &host, &plain, "host", report)?;
        report.compare(
            format!("{subject} host: dequantized"),
            count_different_bits(&widened::<E>(theirs)?, &expected),
            0.0,
        );
        let json = theirs.state.metadata_json();
        report.compare(format!("{subject} host: quant_state"), f64::from(json.as_bytes() != self.json), 0.0);

        let linear = Linear4bit::from_quantized(&matrix(theirs.clone()), device)?;
        let ours = to_vec(linear.dequantize(FloatDType::F32))?;
        report.compare(format!("{subject} device: dequantized"), count_different_bits(&ours, &expected), 0.0);
        match device.as_dispatch() {
            DispatchDevice::Cube(cube) => {
                let client = cube.client();
                let quantize = |config: &QuantConfig| -> Result<Quantized4bit> {
                    // A device without the format takes the same values as f32.
                    let (format, handle) = match kernels::supports(&client, E::FORMAT) {
                        true => (E::FORMAT, client.create_from_slice(self.input.data)),
                        false => {
                            let wide: Vec<u8> = input.iter().flat_map(|v| v.to_f32().to_le_bytes()).collect();
                            (FloatFormat::F32, client.create_from_slice(&wide))
                        }
                    };
                    let weight: DeviceWeight = kernels::quantize(&client, handle, format, input.len(), config)?;
                    Ok(weight.to_host(&client, shape, E::FORMAT)?)
                };
                let plain = quantize(&QuantConfig { double_quant: false, ..config })?;
                self.compare_quantized(input, &quantize(&config)?, &plain, "device", report)
            }
            // Flex runs the host codec.
            _ => Ok(()),
        }
    }

    /// `ours` was quantized with the recorded settings, `plain` without double quantization.
    fn compare_quantized<E: Element>(
        &self,
        input: &[E],
        ours: &Quantized4bit,
        plain: &Quantized4bit,
        place: &str,
        report: &mut Report,
    ) -> Result<()> {
        let Self { theirs, subject, .. } = self;
        let subject = format!("{subject} {place}");
        let absmax = plain.state.absmax_f32();
        let (wrong, ties) = differing_codes(input, &absmax, ours, theirs);
        let note = if ties > 0 { format!("{ties} on a threshold") } else { String::new() };
        report.compare_noted(format!("{subject}: codes"), wrong, 0.0, note);
        match (&theirs.state.absmax, &ours.state.absmax) {
            (Absmax::Plain(theirs), Absmax::Plain(ours)) => {
                report.compare(format!("{subject}: absmax"), count_different_bits(ours, theirs), 0.0);
            }
            (Absmax::Nested(theirs), Absmax::Nested(ours)) => {
                report.compare(format!("{subject}: nested_offset, in ulp"), ulps(ours.offset, theirs.offset), 1.0);
                let given = NestedAbsmax::quantize_with(&absmax, theirs.offset, theirs.blocksize)?;
                let wrong =
                    count_different(&given.codes, &theirs.codes) + count_different_bits(&given.absmax, &theirs.absmax);
                report.compare(format!("{subject}: nested absmax given the offset"), wrong, 0.0);
                // The device's own double quantization, given its own offset.
                let again = NestedAbsmax::quantize_with(&absmax, ours.offset, ours.blocksize)?;
                let wrong =
                    count_different(&ours.codes, &again.codes) + count_different_bits(&ours.absmax, &again.absmax);
                report.compare(format!("{subject}: double quantization"), wrong, 0.0);
            }
            _ => report.fail(format!("{subject}: absmax"), "one side is double-quantized, the other is not"),
        }
        Ok(())
    }
}

/// How many codes differ, and how many more do on a threshold where bitsandbytes may go either way.
fn differing_codes<E: Element>(
    input: &[E],
    absmax: &[f32],
    ours: &Quantized4bit,
    theirs: &Quantized4bit,
) -> (f64, usize) {
    let (mut wrong, mut ties) = (ours.codes.len().abs_diff(theirs.codes.len()), 0);
    for (byte, (a, b)) in ours.codes.iter().zip(&theirs.codes).enumerate() {
        // The first element is the high nibble; the last low nibble of an odd number is padding.
        for (index, (a, b)) in [(2 * byte, (a >> 4, b >> 4)), (2 * byte + 1, (a & 15, b & 15))] {
            if a == b || index >= input.len() {
                continue;
            }
            let block = absmax.get(index / ours.state.blocksize).copied().unwrap_or(0.0);
            let scaled = (input[index].to_f32() * (1.0 / block)).abs();
            let on_threshold = E::FORMAT != FloatFormat::BF16
                && ours.state.quant_type == QuantType::Fp4
                && FP4_THRESHOLDS.iter().any(|t| ulps(scaled, *t) <= 2.0);
            if on_threshold { ties += 1 } else { wrong += 1 }
        }
    }
    (wrong as f64, ties)
}

/// The dequantized weight in its own format, widened to compare.
fn widened<E: Element>(weight: &Quantized4bit) -> Result<Vec<f32>> {
    Ok(weight.dequantize::<E>()?.into_iter().map(E::to_f32).collect())
}

/// The same weight as a matrix, whatever its shape.
fn matrix(mut weight: Quantized4bit) -> Quantized4bit {
    if weight.state.shape.len() != 2 {
        weight.state.shape = vec![1, weight.state.num_elements()];
    }
    weight
}

/// The signed dynamic map, and quantization with it; what double quantization of absmax is made of.
fn blockwise(file: &Checkpoint, _: &Device, report: &mut Report) -> Result<()> {
    let recorded = |name: &str| -> Result<Vec<f32>> { Ok(file.tensor(name)?.to_f32_vec()?) };
    report.compare(
        "bnb dynamic_map_signed",
        count_different_bits(signed_dynamic_map(), &recorded("dynamic_map_signed")?),
        0.0,
    );
    let inputs: Vec<&str> = file.names().filter_map(|name| name.strip_suffix(".input")).collect();
    for name in inputs {
        let subject = format!("bnb quantize_blockwise {name}");
        if recorded(&format!("{name}.code"))? != signed_dynamic_map() {
            report.skip(subject, "not quantized with the signed dynamic map, the only one in use here");
            continue;
        }
        let (input, absmax) = (recorded(&format!("{name}.input"))?, recorded(&format!("{name}.absmax"))?);
        // The file gives the number of blocks; blocksizes are powers of two.
        let blocksize = input.len().div_ceil(absmax.len().max(1)).next_power_of_two();
        let ours = NestedAbsmax::quantize_with(&input, 0.0, blocksize)?;
        let codes = file.tensor(&format!("{name}.q"))?.data;
        report.compare(format!("{subject}: codes"), count_different(&ours.codes, codes), 0.0);
        report.compare(format!("{subject}: absmax"), count_different_bits(&ours.absmax, &absmax), 0.0);
        let dequantized = recorded(&format!("{name}.dequantized"))?;
        // Equal as numbers: 0 * -x + 0 is 0 here and -0 there.
        report.compare(format!("{subject}: dequantized"), count_different(&ours.dequantize(), &dequantized), 0.0);
    }
    if file.contains("dynamic_map_unsigned") {
        report.skip("bnb dynamic_map_unsigned", "of 8-bit optimizers only: section optimizers compares it");
    }
    Ok(())
}

/// y = x W^T and dx = dy W through the frozen 4-bit weight.
fn matmul_4bit(file: &Checkpoint, device: &Device, report: &mut Report) -> Result<()> {
    for module in file.quantized_modules() {
        let weight = file.quantized(module)?.with_context(|| format!("{module}: no quant_state"))?;
        let linear = Linear4bit::from_quantized(&matrix(weight), device)?;
        for (label, dtype) in [("f32", DType::F32), ("bf16", DType::BF16)] {
            let name = |part: &str| format!("{module}.{label}.{part}");
            if !file.contains(&name("x")) {
                continue;
            }
            let subject = format!("bnb matmul_4bit {module} {label}");
            if !device.supports_dtype(dtype) {
                report.skip(subject, format!("the device has no {dtype:?}"));
                continue;
            }
            let upload = |part: &str| -> Result<Tensor<2>> {
                let view = file.tensor(&name(part))?;
                let data = TensorData::new(view.to_f32_vec()?, dims::<2>(&view)?);
                Ok(Tensor::from_data(data, (device, dtype)))
            };
            let x = upload("x")?.autodiff().require_grad();
            let y = linear.forward(x.clone());
            let mut grads = (y.clone() * upload("grad_y")?).sum().backward();
            let grad_x = x.grad_remove(&mut grads).context("x has no gradient")?;
            for (part, ours) in [("y", y.without_autodiff()), ("grad_x", grad_x)] {
                let theirs = file.tensor(&name(part))?.to_f32_vec()?;
                // f32: sums of up to a thousand products in another order, 2^-24 each of sums that reach the
                // largest element's size. bf16: the result is rounded to 8 bits, and may fall on the other
                // side: a unit in the last place of the largest element.
                let relative = if dtype == DType::F32 { 1e-5 } else { 1.0 / 128.0 };
                report.compare(
                    format!("{subject}: {part}"),
                    max_abs_diff(&to_vec(ours)?, &theirs),
                    relative * max_abs(&theirs),
                );
            }
        }
    }
    Ok(())
}
