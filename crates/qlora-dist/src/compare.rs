//! What differs between ranks that should have been started alike.

use std::collections::BTreeMap;

/// Differences that are named; the rest is counted.
const NAMED: usize = 4;
/// Characters of a value that are shown.
const SHOWN: usize = 60;

/// What differs between what the ranks name, in words; empty where nothing does. Each entry of `all` is JSON: pairs of a name and
/// a value.
pub(crate) fn verdict(all: &[Vec<u8>], hosts: &[String]) -> String {
    let mut ranks: Vec<BTreeMap<String, String>> = Vec::with_capacity(all.len());
    for (rank, named) in all.iter().enumerate() {
        match serde_json::from_slice::<Vec<(String, String)>>(named) {
            Ok(pairs) => ranks.push(pairs.into_iter().collect()),
            Err(error) => return format!("what rank {rank} compares can't be read: {error}"),
        }
    }
    let Some((first, others)) = ranks.split_first() else { return String::new() };
    let mut found = Vec::new();
    let names = ranks.iter().flat_map(BTreeMap::keys).collect::<std::collections::BTreeSet<_>>();
    for name in names {
        let mine = first.get(name);
        if let Some((index, theirs)) = others.iter().map(|other| other.get(name)).enumerate().find(|(_, v)| *v != mine)
        {
            let of = |rank: usize, value: Option<&String>| {
                let host = hosts.get(rank).map_or("?", String::as_str);
                format!("{} on rank {rank} ({host})", value.map_or("absent".into(), |value| shortened(value)))
            };
            found.push(format!("{name} is {} and {}", of(0, mine), of(index + 1, theirs)));
        }
    }
    let more = found.len().saturating_sub(NAMED);
    found.truncate(NAMED);
    let more = if more == 0 { String::new() } else { format!("; and {more} more") };
    found.join("; ") + &more
}

fn shortened(value: &str) -> String {
    match value.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}...", &value[..end]),
        None => value.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(ranks: &[&[(&str, &str)]]) -> String {
        let all: Vec<Vec<u8>> = ranks.iter().map(|pairs| serde_json::to_vec(pairs).unwrap_or_default()).collect();
        let hosts: Vec<String> = (0..ranks.len()).map(|rank| format!("host{rank}")).collect();
        verdict(&all, &hosts)
    }

    #[test]
    fn differences_name_ranks_and_hosts() {
        assert_eq!(of(&[&[("a", "1")], &[("a", "1")], &[("a", "1")]]), "");
        assert_eq!(
            of(&[&[("a", "1"), ("b", "2")], &[("b", "2"), ("a", "1")], &[("a", "1"), ("b", "3")]]),
            "b is 2 on rank 0 (host0) and 3 on rank 2 (host2)"
        );
        assert_eq!(of(&[&[], &[("a", "1")]]), "a is absent on rank 0 (host0) and 1 on rank 1 (host1)");
        let many = [("a", "1"), ("b", "1"), ("c", "1"), ("d", "1"), ("e", "1"), ("f", "1")];
        assert!(of(&[&many, &[]]).ends_with("; and 2 more"));
        let long = "ä".repeat(100);
        assert!(of(&[&[("a", &long)], &[("a", "1")]]).contains("ää... on rank 0"));
    }

    #[test]
    fn rubbish_is_told() {
        assert!(verdict(&[b"[]".to_vec(), b"rubbish".to_vec()], &[]).starts_with("what rank 1 compares can't be read"));
    }
}
