//! What a checkpoint is said to hold.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::time::{Duration, Instant};

use adapter_io::listing::{Listing, group_name};
use adapter_io::printable::{printable, shortened};
use adapter_io::{BnbOptions, Checkpoint, quantize_checkpoint};

#[test]
fn layers_are_summed_up_and_4_bit_weights_are_one_tensor() {
    let folder = tempfile::tempdir().unwrap();
    let (base, out) = (folder.path().join("base"), folder.path().join("out"));
    common::model(&base);
    let plain = Listing::new(&Checkpoint::open(&base).unwrap());
    assert_eq!((plain.tensors().len(), plain.bytes()), (12, 2 * plain.parameters()));
    quantize_checkpoint(&base, &out, &BnbOptions::default(), &mut |_| {}).unwrap();
    let checkpoint = Checkpoint::open(&out).unwrap();
    let listing = Listing::new(&checkpoint);
    assert_eq!((listing.parameters(), listing.bytes()), (plain.parameters(), checkpoint.total_bytes()));
    let names = |listing: &Listing| listing.tensors().iter().map(|t| t.name.clone()).collect::<Vec<_>>();
    assert_eq!(names(&listing), names(&plain));
    let up = listing.groups().into_iter().find(|g| g.tensor.name == "model.layers.*.mlp.up_proj.weight").unwrap();
    assert_eq!((up.count, up.tensor.dtype.as_str(), &up.tensor.shape[..]), (1, "NF4", &[32, 16][..]));
    assert_eq!(group_name("model.layers.11.experts.7.w1"), "model.layers.*.experts.*.w1");
}

/// 100,000 4-bit weights of distinct names: a loop over them for each takes minutes.
#[test]
fn a_header_of_any_size_takes_linear_time() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("many.safetensors");
    let mut header = String::from("{");
    let count = 100_000;
    for i in 0..count {
        let empty = r#"{"dtype":"U8","shape":[0],"data_offsets":[0,0]}"#;
        header += &format!(r#""m{i}x.weight":{empty},"m{i}x.weight.quant_state.bitsandbytes__nf4":{empty},"#);
    }
    header.pop();
    header.push('}');
    fs::write(&path, common::file_of(&header, &[])).unwrap();
    let checkpoint = Checkpoint::open_file(&path).unwrap();
    let start = Instant::now();
    let listing = Listing::new(&checkpoint);
    assert_eq!((listing.tensors().len(), listing.groups().len()), (count, count));
    // A second without optimisation, on two cores that are busy.
    assert!(start.elapsed() < Duration::from_secs(60), "{:?}", start.elapsed());
}

#[test]
fn names_of_any_length_and_content_are_fit_to_be_shown() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("strange.safetensors");
    let name = format!(r"\u001b[2J\u009b31m{}", "n".repeat(65_536));
    let header = format!(r#"{{"{name}":{{"dtype":"BF16","shape":[0],"data_offsets":[0,0]}}}}"#);
    fs::write(&path, common::file_of(&header, &[])).unwrap();
    let listing = Listing::new(&Checkpoint::open_file(&path).unwrap());
    let name = &listing.tensors()[0].name;
    assert!(name.starts_with('\u{1b}') && name.len() > 65_536);
    let shown = printable(name);
    let shown = shortened(&shown, 100);
    assert!(shown.starts_with(r"\u{1b}[2J\u{9b}31mnnn") && shown.chars().count() == 100, "{shown}");
}

/// A 4-bit weight's shape is what its file says.
#[test]
fn shapes_that_cannot_be_do_not_overflow() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("large.safetensors");
    let state = r#"{"shape": [18446744073709551615, 4]}"#;
    let n = state.len();
    let header = format!(
        r#"{{"a.weight.quant_state.bitsandbytes__nf4":{{"dtype":"U8","shape":[{n}],"data_offsets":[0,{n}]}},"b.weight.quant_state.bitsandbytes__nf4":{{"dtype":"U8","shape":[{n}],"data_offsets":[{n},{}]}}}}"#,
        2 * n
    );
    fs::write(&path, common::file_of(&header, state.repeat(2).as_bytes())).unwrap();
    let listing = Listing::new(&Checkpoint::open_file(&path).unwrap());
    assert_eq!((listing.tensors().len(), listing.parameters()), (2, u64::MAX));
}
