//! Mutations of bytes: what a broken disk, a cut download or an editor does to any file.

use crate::random::Dice;

/// Bytes that parsers trip over.
const ODD: &[&[u8]] = &[
    b"\0",
    b"\xff",
    b"\xc0\x80",
    b"\xed\xa0\x80",
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"\r",
    b"\x1b[2J",
    b"\"",
    b"\\",
    b"{",
    b"[",
    b"\n",
    b"\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"-",
    b"e999",
];

/// Changes a file's bytes; says what was done.
pub(crate) fn mutate(dice: &mut Dice, bytes: &mut Vec<u8>) -> String {
    let length = bytes.len();
    let at = dice.below(length + 1);
    let size = (1 + dice.below(*dice.clone().pick(&[4, 64, 4096]))).min(length - at.min(length));
    match dice.below(10) {
        0 => {
            bytes.truncate(at);
            format!("cut at byte {at} of {length}")
        }
        1 | 2 => {
            let flips = 1 + dice.below(4);
            for _ in 0..flips.min(length) {
                let at = dice.below(length);
                bytes[at] ^= 1 << dice.below(8);
            }
            format!("{flips} bits flipped")
        }
        3 => {
            let odd = *dice.pick(ODD);
            bytes.splice(at..at, odd.iter().copied());
            format!("{} inserted at byte {at}", odd.escape_ascii())
        }
        4 => {
            let odd = *dice.pick(ODD);
            let end = (at + odd.len()).min(length);
            bytes.splice(at.min(end)..end, odd.iter().copied());
            format!("{} written over byte {at}", odd.escape_ascii())
        }
        5 => {
            bytes.drain(at..at + size);
            format!("{size} bytes removed at byte {at}")
        }
        6 => {
            let span = bytes[at..at + size].to_vec();
            let to = dice.below(length + 1);
            bytes.splice(to..to, span);
            format!("{size} bytes of byte {at} inserted at byte {to}")
        }
        7 => {
            let span = bytes[at..at + size].to_vec();
            let count = (*dice.pick(&[2, 100, 5_000])).min((1 << 20) / size.max(1));
            bytes.splice(at..at, span.repeat(count));
            format!("{size} bytes at byte {at} {count} times")
        }
        8 => {
            for byte in &mut bytes[at..at + size] {
                *byte = dice.below(256) as u8;
            }
            format!("{size} random bytes at byte {at}")
        }
        _ => {
            *bytes = match dice.below(4) {
                0 => Vec::new(),
                1 => [b"\xef\xbb\xbf", bytes.as_slice()].concat(),
                2 => bytes.iter().flat_map(|&byte| [byte, 0]).collect(),
                _ => vec![0; length],
            };
            "all of it".into()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_length_can_be_changed_and_repeats() {
        for length in [0, 1, 2, 100, 10_000] {
            for stream in 0..300 {
                let mutated = || {
                    let mut bytes: Vec<u8> = (0..length).map(|byte| byte as u8).collect();
                    let what = mutate(&mut Dice::new(5, stream), &mut bytes);
                    (what, bytes)
                };
                let (what, bytes) = mutated();
                assert_eq!((&what, &bytes), (&mutated().0, &mutated().1));
                assert!(bytes.len() <= 2 * length + (1 << 21), "{what}");
            }
        }
    }
}
