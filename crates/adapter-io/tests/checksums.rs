//! Checksums of a folder's files, and identities of checkpoints.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::Path;

use adapter_io::checksum::{MANIFEST_FILE, Manifest, fingerprint, sha256, verify};
use adapter_io::{Dtype, ShardedWriter, TensorSpec};
use common::write_checkpoint;

/// A folder like a training checkpoint, with its manifest.
fn checkpoint() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes) in [("adapter_config.json", 300), ("adapter_model.safetensors", 70_000), ("state.json", 0)] {
        fs::write(dir.path().join(name), (0..bytes).map(|i| (i * 7) as u8).collect::<Vec<_>>()).unwrap();
    }
    fs::write(dir.path().join(".hidden"), "x").unwrap();
    fs::create_dir(dir.path().join("folder")).unwrap();
    Manifest::of(dir.path()).unwrap().save(dir.path()).unwrap();
    dir
}

fn flip(path: &Path, byte: usize, bit: u8) {
    let mut bytes = fs::read(path).unwrap();
    bytes[byte] ^= 1 << bit;
    fs::write(path, bytes).unwrap();
}

fn verified(dir: &Path) -> Result<(), String> {
    let manifest = Manifest::load(dir).map_err(|e| e.to_string())?.expect("there is one");
    verify(dir, &manifest).map_err(|e| e.to_string())
}

#[test]
fn sums_are_those_of_sha256sum() {
    let dir = tempfile::tempdir().unwrap();
    // FIPS 180-2, appendix B.1 and B.3.
    fs::write(dir.path().join("abc"), "abc").unwrap();
    fs::write(dir.path().join("million"), vec![b'a'; 1_000_000]).unwrap();
    let sums = [
        ("abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
        ("million", "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"),
    ];
    assert_eq!(sha256(&dir.path().join("million")).unwrap(), sums[1].1);
    assert_eq!(Manifest::of(dir.path()).unwrap().sums().collect::<Vec<_>>(), sums);
}

#[test]
fn a_manifest_names_the_files_and_survives_a_round_trip() {
    let dir = checkpoint();
    let manifest = Manifest::load(dir.path()).unwrap().unwrap();
    let names: Vec<_> = manifest.sums().map(|(name, _)| name).collect();
    assert_eq!(names, ["adapter_config.json", "adapter_model.safetensors", "state.json"]);
    assert_eq!(Manifest::of(dir.path()).unwrap(), manifest);
    assert_eq!(verified(dir.path()), Ok(()));
    assert_eq!(Manifest::load(&dir.path().join("folder")).unwrap(), None);
}

#[test]
fn a_flipped_bit_is_found_in_any_file() {
    for (name, byte, bit) in [("adapter_config.json", 0, 0), ("adapter_model.safetensors", 69_999, 7)] {
        let dir = checkpoint();
        flip(&dir.path().join(name), byte, bit);
        let message = verified(dir.path()).unwrap_err();
        for part in [name, "damaged", "SHA-256", "older"] {
            assert!(message.contains(part), "{message}");
        }
    }
}

#[test]
fn a_file_that_is_missing_or_grown_is_named() {
    let dir = checkpoint();
    fs::remove_file(dir.path().join("state.json")).unwrap();
    let message = verified(dir.path()).unwrap_err();
    assert!(message.contains("state.json") && message.contains("missing"), "{message}");
    fs::write(dir.path().join("state.json"), "{}").unwrap();
    assert!(verified(dir.path()).unwrap_err().contains("state.json"));
    // A file that came later is not the manifest's matter.
    fs::write(dir.path().join("state.json"), "").unwrap();
    fs::write(dir.path().join("notes.txt"), "mine").unwrap();
    assert_eq!(verified(dir.path()), Ok(()));
}

/// Wherever a bit of the manifest flips, it is the manifest that is blamed, and no other file.
#[test]
fn a_damaged_manifest_is_told_from_damaged_files() {
    let dir = checkpoint();
    let path = dir.path().join(MANIFEST_FILE);
    let whole = fs::read(&path).unwrap();
    let mut unseen = 0;
    for byte in 0..whole.len() {
        flip(&path, byte, (byte % 7) as u8);
        match verified(dir.path()) {
            Err(message) => assert!(message.contains(MANIFEST_FILE) && message.contains("other files"), "{message}"),
            // White space that became other white space.
            Ok(()) => unseen += 1,
        }
        fs::write(&path, &whole).unwrap();
    }
    assert!(unseen < 10, "{unseen}");
}

#[test]
fn a_manifest_leads_nowhere_else() {
    let dir = checkpoint();
    for name in ["../secret", "/etc/passwd", "folder/x", ".."] {
        fs::write(dir.path().join(MANIFEST_FILE), format!("{{\"{name}\": \"00\"}}")).unwrap();
        let message = Manifest::load(dir.path()).unwrap_err().to_string();
        assert!(message.contains("outside of its folder"), "{message}");
    }
}

/// A checkpoint of three tensors, the last of which holds `value` in its middle.
fn base(dir: &Path, shard_bytes: u64, value: u8) {
    let spec = |name, rows| TensorSpec::new(name, Dtype::BF16, &[rows, 512]);
    let specs = vec![spec("a.weight", 600), spec("b.weight", 600), spec("c.weight", 20)];
    let mut writer = ShardedWriter::create(dir, specs.clone(), shard_bytes).unwrap();
    for spec in &specs {
        let mut bytes = vec![0x11; spec.num_bytes().unwrap()];
        if spec.name == "c.weight" {
            let middle = bytes.len() / 2;
            bytes[middle] = value;
        }
        writer.write(&spec.name, &bytes).unwrap();
    }
    writer.finish().unwrap();
}

#[test]
fn other_base_weights_have_another_fingerprint() {
    for shard_bytes in [1 << 30, 100_000] {
        let [one, same, other] = [(); 3].map(|()| tempfile::tempdir().unwrap());
        base(one.path(), shard_bytes, 0x11);
        base(same.path(), shard_bytes, 0x11);
        base(other.path(), shard_bytes, 0x12);
        let of_one = fingerprint(one.path()).unwrap();
        assert_eq!((of_one.len(), &of_one), (64, &fingerprint(same.path()).unwrap()), "where it lies does not matter");
        assert_ne!(of_one, fingerprint(other.path()).unwrap());
    }
}

#[test]
fn a_fingerprint_sees_names_lengths_and_every_byte_of_a_small_file() {
    let dir = tempfile::tempdir().unwrap();
    write_checkpoint(dir.path(), 1 << 20);
    let path = dir.path().join("model.safetensors");
    let whole = fs::read(&path).unwrap();
    let mut seen = std::collections::BTreeSet::from([fingerprint(dir.path()).unwrap()]);
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    for byte in header..whole.len() {
        flip(&path, byte, 3);
        assert!(seen.insert(fingerprint(dir.path()).unwrap()), "byte {byte}");
        fs::write(&path, &whole).unwrap();
    }
    let renamed = String::from_utf8_lossy(&whole[..header]).replace("up_proj", "xx_proj").into_bytes();
    fs::write(&path, [&renamed[..], &whole[header..]].concat()).unwrap();
    assert!(seen.insert(fingerprint(dir.path()).unwrap()));
}
