//! Checkpoints that are written and read back, and checkpoints that are broken.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::Path;

use adapter_io::checkpoint::refuse_adapter;
use adapter_io::{Checkpoint, Dtype, FormatError, ShardedWriter, TensorSpec, atomic};
use common::{content, file_of, specs, write_checkpoint};

fn open_error(dir: &Path) -> String {
    Checkpoint::open(dir).map(|c| c.names().count()).expect_err("must be refused").to_string()
}

#[test]
fn single_and_sharded_checkpoints_hold_the_same() {
    for (shard_bytes, files) in [(1 << 20, 1), (100, 2), (64, 3), (1, 3)] {
        let dir = tempfile::tempdir().unwrap();
        write_checkpoint(dir.path(), shard_bytes);
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        assert_eq!(checkpoint.files().count(), files, "{shard_bytes}");
        assert_eq!(checkpoint.total_bytes(), 160);
        assert_eq!(checkpoint.names_in_file_order().len(), 3);
        for spec in specs() {
            let view = checkpoint.tensor(&spec.name).unwrap();
            assert_eq!((view.dtype, &view.shape, view.data), (spec.dtype, &spec.shape, &content(&spec)[..]));
            assert_eq!(view.to_f32_vec().unwrap().len(), view.num_elements());
        }
        // Nothing temporary is left behind.
        assert!(fs::read_dir(dir.path()).unwrap().all(|e| !e.unwrap().file_name().to_string_lossy().starts_with('.')));
    }
}

#[test]
fn shards_and_index_are_laid_out_as_transformers_does() {
    let dir = tempfile::tempdir().unwrap();
    write_checkpoint(dir.path(), 64);
    let index = fs::read_to_string(dir.path().join("model.safetensors.index.json")).unwrap();
    let expected = r#"{
  "metadata": {
    "total_parameters": 64,
    "total_size": 160
  },
  "weight_map": {
    "model.embed_tokens.weight": "model-00001-of-00003.safetensors",
    "model.layers.0.mlp.up_proj.weight": "model-00002-of-00003.safetensors",
    "model.norm.weight": "model-00003-of-00003.safetensors"
  }
}
"#;
    assert_eq!(index, expected);
}

#[test]
fn layout_inside_a_file_is_that_of_the_safetensors_crate() {
    let dir = tempfile::tempdir().unwrap();
    write_checkpoint(dir.path(), 1 << 20);
    let ours = fs::read(dir.path().join("model.safetensors")).unwrap();
    let data: Vec<_> = specs().into_iter().map(|s| (content(&s), s)).collect();
    let views = data.iter().map(|(bytes, s)| {
        (s.name.as_str(), safetensors::tensor::TensorView::new(s.dtype, s.shape.clone(), bytes).unwrap())
    });
    let metadata = [("format".to_string(), "pt".to_string())].into();
    assert!(ours == safetensors::serialize(views, Some(metadata)).unwrap());
}

#[test]
fn missing_shard_is_named_with_what_it_holds() {
    let dir = tempfile::tempdir().unwrap();
    write_checkpoint(dir.path(), 64);
    fs::remove_file(dir.path().join("model-00002-of-00003.safetensors")).unwrap();
    let message = open_error(dir.path());
    for part in ["model-00002-of-00003.safetensors", "1 tensors", "model.layers.0.mlp.up_proj.weight", "download"] {
        assert!(message.contains(part), "{message}");
    }
}

#[test]
fn truncated_files_name_the_tensor_that_is_cut() {
    let dir = tempfile::tempdir().unwrap();
    write_checkpoint(dir.path(), 1 << 20);
    let path = dir.path().join("model.safetensors");
    let whole = fs::read(&path).unwrap();
    for keep in [0, 3, 8, 40, whole.len() - 160, whole.len() - 33, whole.len() - 1] {
        fs::write(&path, &whole[..keep]).unwrap();
        let message = open_error(dir.path());
        assert!(message.contains("model.safetensors"), "{message}");
        if keep >= whole.len() - 160 {
            assert!(message.contains("cut short"), "{message}");
        }
        if keep == whole.len() - 1 {
            // Laid out widest type first, BF16 before F16: the last tensor is the norm.
            let last = if message.contains("norm") { "model.norm.weight" } else { "model.layers.0.mlp.up_proj.weight" };
            assert!(message.contains(last), "{message}");
            assert!(message.contains(&format!("{} bytes", whole.len())), "{message}");
        }
    }
}

#[test]
fn headers_that_lie_are_refused_by_tensor() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    let t = |shape: &str, dtype: &str, offsets: &str| {
        format!(r#""t":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}"#)
    };
    for (header, says) in [
        (format!("{{{}}}", t("[2]", "F32", "[0,9]")), "do not fit shape"),
        (format!("{{{}}}", t("[2]", "F33", "[0,8]")), "unknown data type `F33`"),
        (format!("{{{}}}", t("[2]", "F32", "[8,0]")), "do not fit shape"),
        (format!("{{{}}}", t("[2]", "F32", "[4,12]")), "gap"),
        (format!("{{{}}}", t("[1]", "F32", "[0,4]")), "follow the last tensor"),
        (format!("{{{}}}", t("[4294967296,4294967296,4294967296]", "F32", "[0,8]")), "no valid size"),
        (format!("{{{},{}}}", t("[2]", "F32", "[0,8]"), t("[0]", "F32", "[8,8]")), "twice"),
        (
            format!("{{{},{}}}", t("[2]", "F32", "[0,8]"), t("[1]", "F32", "[4,8]").replace("\"t\"", "\"u\"")),
            "overlaps",
        ),
        (r#"{"t":5}"#.to_string(), "tensor `t`"),
        ("[]".to_string(), "not valid"),
    ] {
        fs::write(&path, file_of(&header, &[0; 8])).unwrap();
        let message = open_error(dir.path());
        assert!(message.contains(says) && message.contains("model.safetensors"), "{header}: {message}");
    }
    fs::write(&path, u64::MAX.to_le_bytes()).unwrap();
    assert!(open_error(dir.path()).contains("not a safetensors file"));
}

#[test]
fn wrong_shape_and_missing_tensor_say_what_there_is() {
    let dir = tempfile::tempdir().unwrap();
    write_checkpoint(dir.path(), 64);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let view = checkpoint.tensor("model.embed_tokens.weight").unwrap();
    assert!(view.expect_shape(&[4, 4]).is_ok());
    let message = view.expect_shape(&[8, 4]).unwrap_err().to_string();
    for part in ["model-00001-of-00003.safetensors", "model.embed_tokens.weight", "[4, 4]", "[8, 4]", "config.json"] {
        assert!(message.contains(part), "{message}");
    }
    let message = checkpoint.tensor("model.layers.0.mlp.up_proj.wieght").unwrap_err().to_string();
    assert!(message.contains("nearest name is `model.layers.0.mlp.up_proj.weight`"), "{message}");
    assert!(checkpoint.tensor("x").unwrap_err().to_string().ends_with("no tensor `x`"));
    let bytes = TensorSpec::new("bytes", Dtype::U8, &[4]);
    let other = tempfile::tempdir().unwrap();
    let mut writer = ShardedWriter::create(other.path(), vec![bytes], 1 << 20).unwrap();
    writer.write("bytes", &[1, 2, 3, 4]).unwrap();
    writer.finish().unwrap();
    let checkpoint = Checkpoint::open(other.path()).unwrap();
    let message = checkpoint.tensor("bytes").unwrap().to_f32_vec().unwrap_err().to_string();
    assert!(message.contains("`bytes` has data type U8, expected F32, F16, BF16 or F64"), "{message}");
}

fn with_index(entry: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join("checkpoint")).unwrap();
    let index = serde_json::json!({"metadata": {}, "weight_map": {"t": entry}});
    fs::write(dir.path().join("checkpoint/model.safetensors.index.json"), index.to_string()).unwrap();
    fs::write(
        dir.path().join("secret.safetensors"),
        file_of(r#"{"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#, &[7]),
    )
    .unwrap();
    dir
}

#[test]
fn names_that_lead_out_of_the_folder_are_refused() {
    for entry in [
        "../secret.safetensors",
        "/etc/passwd",
        "a/../../secret.safetensors",
        "..\\secret.safetensors",
        "C:secret",
        "",
        ".",
        "a/..",
    ] {
        let dir = with_index(entry);
        let error = Checkpoint::open(&dir.path().join("checkpoint")).map(|_| ()).unwrap_err();
        assert!(matches!(error, FormatError::UnsafePath { .. }), "{entry}: {error}");
        assert!(error.to_string().contains("index.json"), "{error}");
    }
    let dir = with_index("secret.safetensors");
    fs::copy(dir.path().join("secret.safetensors"), dir.path().join("checkpoint/secret.safetensors")).unwrap();
    assert_eq!(Checkpoint::open(&dir.path().join("checkpoint")).unwrap().tensor("t").unwrap().data, [7]);
}

#[cfg(unix)]
#[test]
fn links_are_followed_only_inside_the_folder_or_the_hub_cache() {
    use std::os::unix::fs::symlink;
    let dir = with_index("link.safetensors");
    let (inside, link) = (dir.path().join("checkpoint"), dir.path().join("checkpoint/link.safetensors"));
    symlink("../secret.safetensors", &link).unwrap();
    let message = open_error(&inside);
    assert!(message.contains("link that leads out of the folder"), "{message}");
    fs::remove_file(&link).unwrap();
    fs::rename(dir.path().join("secret.safetensors"), inside.join("real.safetensors")).unwrap();
    symlink("real.safetensors", &link).unwrap();
    assert!(Checkpoint::open(&inside).is_ok());

    // The hub's cache: snapshots/<commit>/file -> ../../blobs/<hash>.
    let hub = tempfile::tempdir().unwrap();
    let repo = hub.path().join("models--org--name");
    let (blobs, snapshot) = (repo.join("blobs"), repo.join("snapshots/0123abc"));
    fs::create_dir_all(&blobs).unwrap();
    fs::create_dir_all(&snapshot).unwrap();
    fs::copy(inside.join("real.safetensors"), blobs.join("f00")).unwrap();
    symlink("../../blobs/f00", snapshot.join("model.safetensors")).unwrap();
    assert!(Checkpoint::open(&snapshot).unwrap().contains("t"));
    // Another repository's blobs are not ours.
    let other = hub.path().join("models--org--other/blobs");
    fs::create_dir_all(&other).unwrap();
    fs::rename(blobs.join("f00"), other.join("f00")).unwrap();
    fs::remove_file(snapshot.join("model.safetensors")).unwrap();
    symlink("../../../models--org--other/blobs/f00", snapshot.join("model.safetensors")).unwrap();
    assert!(open_error(&snapshot).contains("leads out"));
}

#[test]
fn folders_without_a_checkpoint_say_what_they_hold() {
    let dir = tempfile::tempdir().unwrap();
    assert!(open_error(&dir.path().join("nowhere")).contains("no such folder"));
    for (name, says) in [
        ("pytorch_model.bin", "pickled weights such as pytorch_model.bin"),
        ("model.Q4_K_M.gguf", "GGUF"),
        ("adapter_config.json", "it is an adapter"),
    ] {
        fs::write(dir.path().join(name), b"x").unwrap();
        assert!(open_error(dir.path()).contains(says));
    }
    fs::write(dir.path().join("model.safetensors.index.json"), b"{ oops").unwrap();
    assert!(open_error(dir.path()).contains("not valid JSON"));
}

/// What a download that broke off leaves in the hub's cache.
#[cfg(unix)]
#[test]
fn a_link_to_a_missing_file_is_told_from_another_name() {
    let dir = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink("../../blobs/gone", dir.path().join("model.safetensors")).unwrap();
    let message = open_error(dir.path());
    assert!(message.contains("model.safetensors is a link to a file that is missing"), "{message}");
    assert!(message.contains("download the model again"), "{message}");
}

/// What a clone without Git LFS leaves in the place of large files.
#[test]
fn a_pointer_of_git_lfs_is_called_one() {
    let dir = tempfile::tempdir().unwrap();
    let pointer = format!("version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 4096\n", "0".repeat(64));
    write_checkpoint(dir.path(), 64);
    for name in ["model-00002-of-00003.safetensors", "model.safetensors.index.json", "model.safetensors"] {
        fs::write(dir.path().join(name), &pointer).unwrap();
        let message = open_error(dir.path());
        assert!(message.contains(name) && message.contains("git lfs pull"), "{message}");
    }
    fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    fs::write(dir.path().join("config.json"), &pointer).unwrap();
    write_checkpoint(dir.path(), 64);
    let out = dir.path().join("out");
    let result = adapter_io::quantize_checkpoint(dir.path(), &out, &adapter_io::BnbOptions::default(), &mut |_| {});
    let message = result.unwrap_err().to_string();
    assert!(message.contains("config.json") && message.contains("git lfs pull"), "{message}");
}

#[test]
fn an_adapter_is_not_taken_for_a_model() {
    let dir = tempfile::tempdir().unwrap();
    let refused = || refuse_adapter(dir.path()).map_err(|e| e.to_string());
    assert_eq!(refused(), Ok(()));
    fs::write(dir.path().join("adapter_config.json"), "{}").unwrap();
    let message = refused().unwrap_err();
    assert!(message.contains("it is an adapter") && message.contains("--adapter"), "{message}");
    // The base's configuration beside it makes it no model; weights do.
    fs::write(dir.path().join("config.json"), "{}").unwrap();
    assert_eq!(refused().unwrap_err(), message);
    write_checkpoint(dir.path(), 64);
    assert_eq!(refused(), Ok(()));
}

#[test]
fn a_shard_without_its_tensor_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    write_checkpoint(dir.path(), 64);
    let index = dir.path().join("model.safetensors.index.json");
    let text = fs::read_to_string(&index).unwrap().replace("model.norm.weight", "model.norm.wight");
    fs::write(&index, text).unwrap();
    let message = open_error(dir.path());
    assert!(
        message.contains("00003") && message.contains("`model.norm.wight`") && message.contains("`model.norm.weight`"),
        "{message}"
    );
}

#[test]
fn writer_refuses_what_was_not_announced_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = ShardedWriter::create(dir.path(), specs(), 64).unwrap();
    assert!(writer.write("other", &[]).unwrap_err().to_string().contains("not announced"));
    assert!(writer.write("model.norm.weight", &[0; 31]).unwrap_err().to_string().contains("31 bytes came, 32"));
    writer.write("model.norm.weight", &[0; 32]).unwrap();
    assert!(writer.write("model.norm.weight", &[0; 32]).unwrap_err().to_string().contains("before"));
    assert!(writer.finish().unwrap_err().to_string().contains("never written"));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    let twice = [specs(), specs()].concat();
    assert!(ShardedWriter::create(dir.path(), twice, 64).unwrap_err().to_string().contains("twice"));
    assert!(
        ShardedWriter::create(&dir.path().join("nowhere"), specs(), 64)
            .unwrap_err()
            .to_string()
            .contains("cannot write")
    );
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn a_whole_checkpoint_replaces_another() {
    let parent = tempfile::tempdir().unwrap();
    let target = parent.path().join("out");
    for shard_bytes in [64, 1 << 20] {
        atomic::replace_dir::<FormatError>(&target, |dir| {
            write_checkpoint(dir, shard_bytes);
            Ok(())
        })
        .unwrap();
    }
    let names: Vec<_> = fs::read_dir(&target).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, ["model.safetensors"]);
    assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 1);
}
