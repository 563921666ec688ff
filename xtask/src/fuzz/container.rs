//! Mutations of safetensors: a header in JSON, after its length in eight bytes and before the tensors' bytes.

use super::json::{self, Node};
use crate::random::Dice;

/// Values that mean something in a header.
const GRAFTS: &[&str] = &[
    "\"F32\"",
    "\"F16\"",
    "\"BF16\"",
    "\"F64\"",
    "\"U8\"",
    "\"I8\"",
    "\"I64\"",
    "\"BOOL\"",
    "\"F8_E4M3\"",
    "\"F4\"",
    "\"C64\"",
    "\"X\"",
    "[0, 0]",
    "[1, 0]",
    "[0, 18446744073709551615]",
    "[0, 4]",
    "[0]",
    "[0, 1, 2]",
    "[4294967296, 4294967296]",
    "[9223372036854775807, 2]",
    "[0, 9223372036854775807]",
    "{\"dtype\": \"F32\", \"shape\": [], \"data_offsets\": [0, 4]}",
    "{\"dtype\": \"F32\", \"shape\": [1], \"data_offsets\": [0, 4]}",
    "{\"dtype\": \"U8\", \"shape\": [0], \"data_offsets\": [0, 0]}",
];

/// Values that weights must not have, as bf16 and the upper half of f32.
const ODD_VALUES: &[u16] = &[0x7fc0, 0x7f80, 0xff80, 0x7f7f, 0x0001, 0xffff];

/// Changes a file; says what was done.
pub(crate) fn mutate(dice: &mut Dice, bytes: &mut Vec<u8>) -> String {
    let Some((mut header, data)) = split(bytes) else { return super::bytes::mutate(dice, bytes) };
    match dice.below(10) {
        0..=5 => {
            let what = json::mutate(dice, &mut header, GRAFTS);
            *bytes = join(&header.to_string(), None, &data);
            format!("header {what}")
        }
        6 => {
            let text = header.to_string();
            let honest = text.len() as u64;
            let lie = *dice.pick(&[
                0,
                1,
                2,
                honest - 1,
                honest + 1,
                honest * 2,
                100_000_000,
                100_000_001,
                1 << 31,
                1 << 32,
                1 << 40,
                1 << 62,
                1 << 63,
                u64::MAX - 7,
                u64::MAX,
            ]);
            *bytes = join(&text, Some(lie), &data);
            format!("header's length {lie} instead of {honest}")
        }
        7 => {
            let mut data = data;
            let what = super::bytes::mutate(dice, &mut data);
            *bytes = join(&header.to_string(), None, &data);
            format!("data: {what}")
        }
        8 => {
            let mut data = data;
            let value = *dice.pick(ODD_VALUES);
            let at = dice.below(data.len() / 2) * 2;
            if let Some(place) = data.get_mut(at..at + 2) {
                place.copy_from_slice(&value.to_le_bytes());
            }
            *bytes = join(&header.to_string(), None, &data);
            format!("data: {value:#x} at byte {at}")
        }
        _ => super::bytes::mutate(dice, bytes),
    }
}

fn split(bytes: &[u8]) -> Option<(Node, Vec<u8>)> {
    let (length, rest) = bytes.split_first_chunk::<8>()?;
    let length = usize::try_from(u64::from_le_bytes(*length)).ok()?;
    Some((Node::parse(rest.get(..length)?)?, rest.get(length..)?.to_vec()))
}

fn join(header: &str, length: Option<u64>, data: &[u8]) -> Vec<u8> {
    let length = length.unwrap_or(header.len() as u64).to_le_bytes();
    [&length, header.as_bytes(), data].concat()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn headers_and_data_are_changed_apart() {
        let header = r#"{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}"#;
        let file = join(header, None, &[7; 8]);
        let (tree, data) = split(&file).unwrap();
        assert_eq!((tree.to_string().as_str(), data.as_slice()), (header, &[7; 8][..]));
        let mutated = |stream| {
            let mut bytes = file.clone();
            let what = mutate(&mut Dice::new(2, stream), &mut bytes);
            (what, bytes)
        };
        let all: Vec<_> = (0..500).map(mutated).collect();
        assert_eq!(mutated(9), mutated(9));
        for kind in ["header /w", "header's length", "data: 0x7fc0", "data: "] {
            assert!(all.iter().any(|(what, _)| what.starts_with(kind)), "{kind}");
        }
        // A changed header stays readable as far as it is JSON: its length is right.
        let readable =
            all.iter().filter(|(what, bytes)| what.starts_with("header /") && split(bytes).is_some()).count();
        assert!(readable > 150, "{readable}");
    }
}
