//! Fields that have one value or a list.

use std::fmt;

use serde::de::value::SeqAccessDeserializer;
use serde::de::{Error, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

/// `stop`: a text or several.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Stop(pub Vec<String>);

impl<'de> Deserialize<'de> for Stop {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Texts;
        impl<'de> Visitor<'de> for Texts {
            type Value = Stop;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a string or a list of strings")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Stop, E> {
                Ok(Stop(vec![text.into()]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Stop, A::Error> {
                Vec::deserialize(SeqAccessDeserializer::new(list)).map(Stop)
            }
        }
        deserializer.deserialize_any(Texts)
    }
}

/// `prompt`: a text, a list of texts, a list of tokens, or a list of those. Token lists are read without a detour
/// through a tree of JSON values, which takes many times their bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum PromptField {
    Texts(Vec<String>),
    Tokens(Vec<Vec<u32>>),
}

/// What a list begins with.
enum First {
    Text(String),
    Token(u32),
    Tokens(Vec<u32>),
}

const EXPECTED: &str = "a string, a list of strings, a list of token ids, or a list of lists of token ids";

impl<'de> Deserialize<'de> for First {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Element;
        impl<'de> Visitor<'de> for Element {
            type Value = First;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a string, a token id or a list of token ids")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<First, E> {
                Ok(First::Text(text.into()))
            }

            fn visit_u64<E: Error>(self, id: u64) -> Result<First, E> {
                u32::try_from(id).map(First::Token).map_err(|_| E::custom(format!("{id} is no token id")))
            }

            fn visit_i64<E: Error>(self, id: i64) -> Result<First, E> {
                Err(E::custom(format!("{id} is no token id")))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<First, A::Error> {
                Vec::deserialize(SeqAccessDeserializer::new(list)).map(First::Tokens)
            }
        }
        deserializer.deserialize_any(Element)
    }
}

impl<'de> Deserialize<'de> for PromptField {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Prompts;
        impl<'de> Visitor<'de> for Prompts {
            type Value = PromptField;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str(EXPECTED)
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<PromptField, E> {
                Ok(PromptField::Texts(vec![text.into()]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<PromptField, A::Error> {
                match list.next_element()? {
                    None => Err(A::Error::custom(format!("an empty list; expected {EXPECTED}"))),
                    Some(First::Text(text)) => rest(list, text).map(PromptField::Texts),
                    Some(First::Token(id)) => rest(list, id).map(|ids| PromptField::Tokens(vec![ids])),
                    Some(First::Tokens(ids)) => rest(list, ids).map(PromptField::Tokens),
                }
            }
        }
        deserializer.deserialize_any(Prompts)
    }
}

/// The list that begins with `first`.
fn rest<'de, T: Deserialize<'de>, A: SeqAccess<'de>>(mut list: A, first: T) -> Result<Vec<T>, A::Error> {
    let mut all = vec![first];
    while let Some(next) = list.next_element()? {
        all.push(next);
    }
    Ok(all)
}
