//! The bytes that each token stands for inside a text.
//!
//! A vocabulary writes tokens in one of a few ways, and the decoder of `tokenizer.json` says in which: byte-level BPE
//! has a printable character for each byte (GPT-2's table), SentencePiece writes a space as U+2581 and bytes that are no
//! characters as `<0xAB>`.

use super::Tokenizer;

/// What SentencePiece writes for a space.
const SPACE: char = '\u{2581}';

/// How a vocabulary writes tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Writing {
    /// One character for each byte.
    ByteLevel,
    /// As text, with [`SPACE`] and `<0xAB>`.
    SentencePiece,
    /// As text.
    Text,
}

impl Tokenizer {
    /// The bytes of every token, by id; empty for ids that there is no token for. Special tokens have the bytes of
    /// their names.
    pub fn token_bytes(&self) -> Vec<Vec<u8>> {
        let writing = self.writing();
        let added = self.inner.get_added_tokens_decoder();
        let vocab = self.inner.get_vocab(true);
        let end = vocab.values().map(|&id| id as usize + 1).max().unwrap_or(0);
        // Ids may have gaps, and files are not to be believed: a table has no more rows than the largest vocabularies.
        let mut tokens = vec![Vec::new(); end.min(MOST_TOKENS)];
        for (text, id) in vocab {
            if let Some(token) = tokens.get_mut(id as usize) {
                *token = match added.get(&id) {
                    Some(added) => added.content.clone().into_bytes(),
                    None => bytes(&text, writing),
                };
            }
        }
        tokens
    }

    /// The ids of special tokens, which [`decode`](Self::decode) can skip.
    pub fn special_token_ids(&self) -> Vec<u32> {
        let added = self.inner.get_added_tokens_decoder();
        let mut ids: Vec<u32> = added.iter().filter(|(_, token)| token.special).map(|(id, _)| *id).collect();
        ids.sort_unstable();
        ids
    }

    fn writing(&self) -> Writing {
        let decoder = self.inner.get_decoder().and_then(|decoder| serde_json::to_value(decoder).ok());
        let Some(decoder) = decoder else { return Writing::Text };
        let steps = decoder.get("decoders").and_then(|steps| steps.as_array()).map(Vec::as_slice);
        let is = |names: &[&str]| {
            let steps = steps.unwrap_or(std::slice::from_ref(&decoder)).iter();
            let mut types = steps.filter_map(|step| step.get("type")?.as_str());
            types.any(|kind| names.contains(&kind))
        };
        if is(&["ByteLevel"]) {
            Writing::ByteLevel
        } else if is(&["ByteFallback", "Metaspace", "Replace"]) {
            Writing::SentencePiece
        } else {
            Writing::Text
        }
    }
}

/// More than any vocabulary has.
const MOST_TOKENS: usize = 1 << 22;

fn bytes(text: &str, writing: Writing) -> Vec<u8> {
    match writing {
        Writing::Text => text.into(),
        Writing::SentencePiece => {
            let hex = text.strip_prefix("<0x").and_then(|text| text.strip_suffix('>'));
            match hex.filter(|hex| hex.len() == 2).and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
                Some(byte) => vec![byte],
                None => text.replace(SPACE, " ").into_bytes(),
            }
        }
        // A character outside the table can only be a token that was never meant as bytes.
        Writing::ByteLevel => text.chars().map(byte).collect::<Option<_>>().unwrap_or_else(|| text.into()),
    }
}

/// The byte that a character of a byte-level vocabulary stands for (GPT-2's `bytes_to_unicode`): printable characters
/// of Latin-1 stand for themselves, the other 68 bytes are counted from U+0100.
fn byte(character: char) -> Option<u8> {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    match u32::from(character) {
        code @ 0..=0xFF => Some(code as u8).filter(|byte| printable(*byte)),
        code => (0..=u8::MAX).filter(|byte| !printable(*byte)).nth(code as usize - 0x100),
    }
}

#[cfg(test)]
mod tests {
    use super::{Writing, byte, bytes};

    #[test]
    fn byte_level_characters_are_a_permutation_of_bytes() {
        let mut seen: Vec<u8> = (0..0x200).filter_map(char::from_u32).filter_map(byte).collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..=u8::MAX).collect::<Vec<_>>());
        assert_eq!(bytes("\u{120}the\u{10A}", Writing::ByteLevel), b" the\n");
    }

    #[test]
    fn sentencepiece_writes_spaces_and_bytes() {
        assert_eq!(bytes("\u{2581}the", Writing::SentencePiece), b" the");
        assert_eq!(bytes("<0xE2>", Writing::SentencePiece), [0xE2]);
        assert_eq!(bytes("<0xZZ>", Writing::SentencePiece), b"<0xZZ>");
    }
}
