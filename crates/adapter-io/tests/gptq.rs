//! GPTQ against rounding to the nearest, on inputs that correlate; and the layout that engines load.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

use adapter_io::{Checkpoint, Dtype, FormatError, GptqCheckpoint, GptqOptions, GptqWeight, gptq_checkpoint};
use test_support::Random;

fn reference(path: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/reference")).join(path)
}

/// Reproducible normal numbers.
fn noise(count: usize, seed: u64) -> Vec<f32> {
    // The deviation is that of a sum of four numbers from -1/2 to 1/2.
    Random(seed).normals(count).into_iter().map(|x| 0.577 * x).collect()
}

/// X^T X of inputs that lie near a few directions, with sizes that differ by a factor of 30, as activations'.
fn hessian(columns: usize, tokens: usize) -> Vec<f32> {
    let (hidden, mix) = (columns / 4, noise(columns / 4 * columns, 5));
    let mut h = vec![0.0; columns * columns];
    for token in 0..tokens {
        let z = noise(hidden, 1000 + token as u64);
        let own = noise(columns, 9000 + token as u64);
        let x: Vec<f32> = (0..columns)
            .map(|c| {
                let shared: f32 = (0..hidden).map(|k| z[k] * mix[k * columns + c]).sum();
                (shared + 0.1 * own[c]) * if c % 7 == 0 { 3.0 } else { 0.1 + c as f32 / columns as f32 }
            })
            .collect();
        for i in 0..columns {
            for j in 0..columns {
                h[i * columns + j] += x[i] * x[j];
            }
        }
    }
    h
}

#[test]
fn outputs_are_kept_better_than_by_rounding() {
    let shape = [40, 96];
    let (weight, h) = (noise(shape[0] * shape[1], 1), hessian(96, 300));
    for group_size in [Some(32), Some(8), None] {
        let mut errors = Vec::new();
        for act_order in [false, true] {
            let options = GptqOptions { group_size, act_order, ..GptqOptions::default() };
            let nearest = GptqWeight::round_to_nearest("m", &weight, &shape, &options).unwrap();
            let gptq = GptqWeight::quantize("m", &weight, &shape, &h, &options).unwrap();
            let (ours, theirs) = (gptq.output_error(&weight, &h), nearest.output_error(&weight, &h));
            // Correlated inputs leave GPTQ well under half of the error; 0.6 allows for another seed.
            assert!(ours < 0.6 * theirs && ours > 0.0, "{options:?}: {ours} {theirs}");
            let order_kept = gptq.g_idx.windows(2).all(|w| w[0] <= w[1]);
            assert_eq!(order_kept, !act_order || group_size.is_none());
            errors.push(ours);
        }
        assert!(errors[1] < errors[0] * 1.1, "act-order hardly ever loses: {errors:?}");
    }
}

#[test]
fn without_correlation_it_is_rounding_to_the_nearest() {
    let shape = [16, 32];
    let weight = noise(512, 3);
    let mut h = vec![0.0; 32 * 32];
    (0..32).for_each(|i| h[i * 32 + i] = 2.0);
    let options = GptqOptions { group_size: Some(16), ..GptqOptions::default() };
    let gptq = GptqWeight::quantize("m", &weight, &shape, &h, &options).unwrap();
    let nearest = GptqWeight::round_to_nearest("m", &weight, &shape, &options).unwrap();
    assert_eq!(gptq, nearest);
    for (i, (w, q)) in weight.iter().zip(nearest.dequantize()).enumerate() {
        let scale = nearest.scales[(i % 32 / 16) * 16 + i / 32].to_f32();
        // Half a step; the largest positive weight of a group is 7.5 steps away and gets 7. The scale's own
        // rounding to f16, 2^-11 of it, counts 7.5 times.
        assert!((w - q).abs() <= scale * 0.504, "{i}: {w} {q} {scale}");
    }
    // An input that is always zero does no harm, whatever its weights.
    h[5 * 32 + 5] = 0.0;
    GptqWeight::quantize("m", &weight, &shape, &h, &options).unwrap();
}

#[test]
fn what_cannot_be_quantized_is_named() {
    let options = GptqOptions { group_size: Some(16), ..GptqOptions::default() };
    let weight = noise(16 * 32, 3);
    let identity: Vec<f32> = (0..1024).map(|i| f32::from(u8::from(i % 33 == 0))).collect();
    let message = |shape: &[usize], weight: &[f32], h: &[f32], options: GptqOptions| {
        GptqWeight::quantize("layers.0.up", weight, shape, h, &options).unwrap_err().to_string()
    };
    let mut broken = identity.clone();
    broken[0] = f32::NAN;
    let mut negative = identity.clone();
    negative[33] = -5.0;
    for (text, says) in [
        (message(&[16, 33], &weight, &identity, options), "divide by 8"),
        (message(&[16, 32], &weight, &identity, GptqOptions { group_size: Some(24), ..options }), "groups of 24"),
        (message(&[16, 32], &weight, &identity[1..], options), "1023 entries"),
        (message(&[16, 32], &weight, &broken, options), "not finite"),
        (message(&[16, 32], &weight, &negative, options), "input 1"),
        (message(&[16, 32], &weight[1..], &identity, options), "511 values"),
        (message(&[16, 32], &weight, &identity, GptqOptions { damp_percent: 1.5, ..options }), "damp_percent"),
    ] {
        assert!(text.contains(says) && text.contains("layers.0.up"), "{says}: {text}");
    }
}

/// The weight as `dequant_gptq` of llama.cpp's converter, and gptqmodel, decode it.
fn decode(checkpoint: &Checkpoint, module: &str) -> Vec<f32> {
    let words = |name: &str| {
        let view = checkpoint.tensor(&format!("{module}.{name}")).unwrap();
        assert_eq!(view.dtype, Dtype::I32, "{name}");
        (view.shape.clone(), bytemuck::pod_collect_to_vec::<u8, u32>(view.data))
    };
    let ((shape, qweight), (_, qzeros), (_, g_idx)) = (words("qweight"), words("qzeros"), words("g_idx"));
    let scales = checkpoint.tensor(&format!("{module}.scales")).unwrap();
    assert_eq!(scales.dtype, Dtype::F16);
    let scales = scales.to_f32_vec().unwrap();
    let (columns, rows) = (shape[0] * 8, shape[1]);
    let nibble = |word: u32, k: usize| (word >> (4 * k) & 15) as f32;
    let mut out = vec![0.0; rows * columns];
    for row in 0..rows {
        for column in 0..columns {
            let group = g_idx[column] as usize;
            let zero = nibble(qzeros[group * rows / 8 + row / 8], row % 8) + 1.0;
            let code = nibble(qweight[column / 8 * rows + row], column % 8);
            out[row * columns + column] = scales[group * rows + row] * (code - zero);
        }
    }
    out
}

#[test]
fn a_checkpoint_is_written_as_engines_load_it() {
    let dir = tempfile::tempdir().unwrap();
    let (base, out) = (reference("tiny-llama"), dir.path().join("out"));
    let options = GptqOptions { group_size: Some(16), act_order: true, ..GptqOptions::default() };
    let skip = vec!["mlp.gate_proj".to_string()];
    let mut calls = 0;
    let mut wrong = String::new();
    let calibrate = |checkpoint: &mut GptqCheckpoint<'_>| -> Result<(), FormatError> {
        let modules: Vec<(String, [usize; 2])> = checkpoint.modules().map(|(m, s)| (m.to_string(), s)).collect();
        // In another order than that of the files.
        for (module, _) in modules.iter().rev().filter(|(_, shape)| *shape == [128, 256]) {
            checkpoint.quantize(module, Some(&hessian(256, 40)))?;
        }
        wrong = checkpoint.quantize("lm_head", None).unwrap_err().to_string();
        Ok(())
    };
    let reports = gptq_checkpoint(&base, &out, &options, &skip, 1_000_000, calibrate, &mut |_| calls += 1).unwrap();
    assert_eq!((reports.len(), calls), (36, 4 * 36 + 20));
    assert!(wrong.contains("lm_head") && wrong.contains("not among"), "{wrong}");
    let (before, after) = (Checkpoint::open(&base).unwrap(), Checkpoint::open(&out).unwrap());
    for report in &reports {
        let weight = before.tensor(&format!("{}.weight", report.module)).unwrap();
        let (values, decoded) = (weight.to_f32_vec().unwrap(), decode(&after, &report.module));
        let nearest = GptqWeight::round_to_nearest(&report.module, &values, &weight.shape, &options).unwrap();
        match (report.output_error, report.nearest_error) {
            (Some(ours), Some(theirs)) => {
                assert!(ours < theirs, "{report:?}");
                let exact = GptqWeight::quantize(&report.module, &values, &weight.shape, &hessian(256, 40), &options);
                assert_eq!(decoded, exact.unwrap().dequantize());
            }
            _ => assert_eq!(decoded, nearest.dequantize(), "{}", report.module),
        }
    }
    assert_eq!(reports.iter().filter(|r| r.output_error.is_some()).count(), 12);
    let kept = "model.layers.3.mlp.gate_proj.weight";
    assert!(after.tensor(kept).unwrap().data == before.tensor(kept).unwrap().data);
    let config: serde_json::Value = serde_json::from_slice(&fs::read(out.join("config.json")).unwrap()).unwrap();
    let block = &config["quantization_config"];
    assert_eq!((&block["quant_method"], &block["bits"], &block["group_size"]), (&"gptq".into(), &4.into(), &16.into()));
    assert_eq!((&block["desc_act"], &block["sym"]), (&true.into(), &true.into()));
    let own: serde_json::Value = serde_json::from_slice(&fs::read(out.join("quantize_config.json")).unwrap()).unwrap();
    assert_eq!(&own, block);
    // The default groups of 128 do not divide this model's MLP.
    let none = |_: &mut GptqCheckpoint<'_>| Ok::<(), FormatError>(());
    let refused =
        gptq_checkpoint(&base, &dir.path().join("x"), &GptqOptions::default(), &[], 1 << 30, none, &mut |_| {});
    let message = refused.unwrap_err().to_string();
    assert!(message.contains("down_proj") && message.contains("688") && !dir.path().join("x").exists(), "{message}");
}
