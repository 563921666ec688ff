//! Stop strings in a text that comes in pieces.
//!
//! The text ends before the stop string that is complete first; of several that are complete at the same character, the
//! longest counts. So the result does not depend on where the pieces were cut. What may yet become a stop string is held
//! back.

/// Watches a text for stop strings.
#[derive(Clone, Debug, Default)]
pub struct StopStrings {
    stops: Vec<String>,
    held: String,
    found: bool,
}

impl StopStrings {
    /// Watches for these; empty ones are left out.
    pub fn new(stops: Vec<String>) -> Self {
        Self { stops: stops.into_iter().filter(|stop| !stop.is_empty()).collect(), held: String::new(), found: false }
    }

    /// Takes a piece and returns the text that can no longer be part of a stop string. Nothing comes behind one.
    pub fn push(&mut self, piece: &str) -> String {
        if self.found {
            return String::new();
        }
        self.held.push_str(piece);
        let complete =
            self.stops.iter().filter_map(|stop| self.held.find(stop).map(|start| (start + stop.len(), start)));
        if let Some((_, start)) = complete.min() {
            self.found = true;
            self.held.truncate(start);
            return std::mem::take(&mut self.held);
        }
        let held = self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - held);
        std::mem::replace(&mut self.held, rest)
    }

    /// What is held back, at the end of the text.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Whether a stop string was found.
    pub fn found(&self) -> bool {
        self.found
    }
}

/// The bytes at the end of `text` that `tag` begins with, as many as can be, but not all of `tag`.
pub(super) fn overlap(text: &str, tag: &str) -> usize {
    let longest = text.len().min(tag.len().saturating_sub(1));
    let begins = |&length: &usize| tag.is_char_boundary(length) && text.as_bytes().ends_with(&tag.as_bytes()[..length]);
    (1..=longest).rev().find(begins).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::StopStrings;

    fn run(stops: &[String], pieces: &[&str]) -> (String, bool) {
        let mut watch = StopStrings::new(stops.to_vec());
        let mut text: String = pieces.iter().map(|piece| watch.push(piece)).collect();
        text += &watch.finish();
        (text, watch.found())
    }

    /// The definition, character by character.
    fn expected(stops: &[String], text: &str) -> (String, bool) {
        for (at, c) in text.char_indices() {
            let so_far = &text[..at + c.len_utf8()];
            let ends = stops.iter().filter(|stop| so_far.ends_with(stop.as_str())).map(String::len).max();
            if let Some(length) = ends {
                return (so_far[..so_far.len() - length].into(), true);
            }
        }
        (text.into(), false)
    }

    #[test]
    fn a_stop_string_across_pieces_is_never_given_out() {
        let mut watch = StopStrings::new(vec!["\n\nUser:".into(), "END".into()]);
        assert_eq!(watch.push("Yes.\n"), "Yes.");
        assert_eq!(watch.push("\n"), "");
        assert_eq!(watch.push("Us"), "");
        assert_eq!(watch.push("ual"), "\n\nUsual");
        assert_eq!(watch.push(" E"), " ");
        assert_eq!(watch.push("NDless"), "");
        assert!(watch.found());
        assert_eq!(watch.push("more"), "");
        assert_eq!(watch.finish(), "");
    }

    proptest! {
        #[test]
        fn pieces_do_not_matter(
            stops in prop::collection::vec("[abé]{1,4}", 0..4),
            pieces in prop::collection::vec("[abcé]{0,3}", 0..12),
        ) {
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            prop_assert_eq!(run(&stops, &pieces), expected(&stops, &pieces.concat()));
        }
    }
}
