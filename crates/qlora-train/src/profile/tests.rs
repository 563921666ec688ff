//! Two steps of a small model, profiled on the CPU.
#![allow(clippy::unwrap_used)]

use super::*;
use crate::config::TrainConfig;
use burn::tensor::{Device, FloatDType};
use qlora_data::{Batch, Example};
use qlora_models::{Decoder, LoadOptions, ModelConfig};
use serde_json::{Value, json};
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::{Layer as _, Registry};

const LAYERS: usize = 3;

/// Runs `steps` steps of two micro-batches each under a profile.
fn profiled(policy: &str, window: Window, steps: u64) -> Trace {
    let shape = json!({"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": LAYERS, "num_attention_heads": 2, "num_key_value_heads": 1,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5});
    let shape = ModelConfig::from_json(&shape, "config.json".as_ref()).unwrap();
    let options = LoadOptions { quantization: Some(Default::default()), dtype: FloatDType::F32 };
    let mut model = Decoder::random(shape, options, 1, &Device::flex(), &mut |_| {}).unwrap();
    let mut config = TrainConfig::default();
    config.set("lora.rank", "4").unwrap();
    config.set("train.activation_checkpointing", policy).unwrap();
    model.attach_lora(&config.lora, 1).unwrap();
    let policy = config.train.activation_checkpointing.fixed().unwrap();
    let mut engine = crate::engine(model, &config.train, policy).unwrap();
    let ids: Vec<u32> = (0..8).collect();
    let labels = ids.iter().map(|&id| i64::from(id)).collect();
    let batch = Batch::new(&[Example { input_ids: ids, labels, line: 1 }], 0);
    let profile = Profile::new(window);
    let subscriber = Registry::default().with(profile.layer().with_filter(filter_fn(ProfileLayer::filter)));
    with_subscriber(subscriber, || {
        for step in 0..steps {
            engine.step(&[batch.clone(), batch.clone()], 1e-3, step).unwrap();
        }
    });
    profile.finish()
}

fn events(trace: &Trace) -> Vec<Value> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("trace.json");
    trace.write(&path).unwrap();
    let json: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    json["traceEvents"].as_array().unwrap().iter().filter(|event| event["ph"] == "X").cloned().collect()
}

fn count(events: &[Value], part: &str) -> usize {
    events.iter().filter(|event| event["args"]["part"] == part && event["cat"] == "host").count()
}

#[test]
fn a_trace_holds_every_part_of_the_profiled_steps() {
    for (policy, parts) in [
        ("full", &[("block_backward", 1), ("block_backward > recompute", 2), ("block_backward > gradient", 2)][..]),
        ("none", &[]),
    ] {
        let trace = profiled(policy, Window { skip: 1, steps: 2 }, 4);
        assert_eq!(trace.steps(), 2, "{policy}");
        let events = events(&trace);
        for (part, times) in
            [("step", 2), ("micro_step", 4), ("embed", 4), ("read_back", 2), ("optimizer", 2), ("block", 4 * LAYERS)]
        {
            assert_eq!(count(&events, part), times, "{policy}: {part}");
        }
        // A block's branches are computed again and differentiated one after the other.
        for (part, times) in parts {
            assert_eq!(count(&events, part), times * 4 * LAYERS, "{policy}: {part}");
        }
        assert_eq!(events.iter().filter(|event| event["name"] == "block 0").count(), 4, "{policy}");
    }
}

#[test]
fn spans_nest() {
    let trace = profiled("full", Window { skip: 0, steps: 1 }, 2);
    let mut spans: Vec<(u64, f64, f64)> = events(&trace)
        .iter()
        .filter(|event| event["cat"] == "host")
        .map(|event| {
            let start = event["ts"].as_f64().unwrap();
            (event["tid"].as_u64().unwrap(), start, start + event["dur"].as_f64().unwrap())
        })
        .collect();
    assert!(spans.len() > 3 * LAYERS);
    spans.sort_by(|a, b| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)).then(b.2.total_cmp(&a.2)));
    let mut open: Vec<(u64, f64, f64)> = Vec::new();
    // Microseconds as decimal fractions: a nanosecond is 1e-3.
    let slack = 1e-3;
    for (thread, start, end) in spans {
        open.retain(|outer| outer.0 == thread && outer.2 > start + slack);
        if let Some(outer) = open.last() {
            assert!(end <= outer.2 + slack, "{start}..{end} in {outer:?}");
        }
        open.push((thread, start, end));
    }
}

#[test]
fn parts_add_up_to_the_steps() {
    let summary = profiled("full", Window { skip: 0, steps: 2 }, 2).summary();
    assert_eq!(summary.steps, 2);
    // Everything of the engine runs within a step on one thread: what is a part's own adds up to the whole.
    let own: Duration = summary.parts.iter().map(|part| part.own).sum();
    assert_eq!(own, summary.host);
    let text = summary.to_string();
    assert!(text.starts_with("2 steps profiled") && text.contains("block_backward > gradient"), "{text}");
}

#[test]
fn a_run_that_ends_early_leaves_what_there_was() {
    assert_eq!(profiled("none", Window { skip: 1, steps: 5 }, 3).steps(), 2);
    let nothing = profiled("none", Window { skip: 5, steps: 5 }, 2);
    assert_eq!((nothing.steps(), events(&nothing).len()), (0, 0));
}

#[test]
fn kernels_have_short_names() {
    for (name, short) in [
        ("nf4_hopper_64", "nf4_hopper_64"),
        ("a::norm::forward_kernel::ForwardKernel", "norm::forward_kernel"),
        ("a::contiguous::base::copy_kernel::CopyKernel", "contiguous::copy_kernel"),
        ("a::binary::kernel_binop::KernelBinop<a::binary::AddOp>", "binary::kernel_binop<AddOp>"),
        ("a::matmul::entry::Entry<a::Args, b::Other<c::D>>", "matmul::entry"),
        ("a::b", "b"),
    ] {
        assert_eq!(short_name(name), short);
    }
}

/// A launch as a device measures it whose clock is `ahead` of the host's, in milliseconds after `epoch`.
fn launch(epoch: Instant, issued: u64, [start, end]: [u64; 2], ahead: Duration) -> Launch {
    let at = |millis| epoch + Duration::from_millis(millis);
    let ticks = cubecl::profile::ProfileTicks::from_start_end(at(start) + ahead, at(end) + ahead);
    let time = ProfileDuration::new(Box::pin(async move { Some(ticks) }), TimingMethod::Device);
    Launch { name: "k", place: "block".into(), issued: at(issued), time: Some(time) }
}

#[test]
fn kernels_stand_on_the_hosts_clock() {
    let epoch = Instant::now();
    for ahead in [Duration::ZERO, Duration::from_secs(13_000)] {
        let launches = || vec![launch(epoch, 1, [3, 5], ahead), launch(epoch, 4, [5, 9], ahead)];
        let (kernels, unmeasured) = read(launches(), epoch);
        let times: Vec<_> = kernels.iter().map(|kernel| [kernel.start, kernel.end].map(|t| t.as_millis())).collect();
        // On its own clock, the second began at once, 1 ms earlier.
        let expected = if ahead.is_zero() { [[3, 5], [5, 9]] } else { [[2, 4], [4, 8]] };
        assert_eq!((times, unmeasured), (expected.to_vec(), 0));
    }
    let lost = Launch { time: None, ..launch(epoch, 1, [2, 3], Duration::ZERO) };
    assert_eq!(read(vec![lost], epoch).1, 1);
}
