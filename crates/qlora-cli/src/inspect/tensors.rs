//! The tensors of a checkpoint, layers summed up, with 4-bit weights as what they stand for.

use burn_qlora::Checkpoint;
use burn_qlora::report::{count, memory};
use serde_json::Value;

use crate::output::Table;

/// Suffix of the JSON tensor that bitsandbytes puts beside a 4-bit weight.
const QUANT_STATE: &str = ".weight.quant_state.bitsandbytes__";

/// A tensor, or a 4-bit weight with its statistics.
struct Entry {
    name: String,
    dtype: String,
    shape: Vec<usize>,
    bytes: u64,
}

impl Entry {
    fn parameters(&self) -> u64 {
        self.shape.iter().map(|size| *size as u64).product()
    }
}

/// The tensors of a checkpoint.
pub struct Listing {
    entries: Vec<Entry>,
}

impl Listing {
    /// Lists a checkpoint.
    pub fn new(checkpoint: &Checkpoint) -> Self {
        let mut entries: Vec<Entry> = Vec::new();
        let quantized: Vec<(String, String)> = checkpoint
            .names()
            .filter_map(|name| {
                name.split_once(QUANT_STATE).map(|(module, kind)| (module.to_string(), kind.to_string()))
            })
            .collect();
        for name in checkpoint.names() {
            let Some(view) = checkpoint.get(name) else { continue };
            let of_quantized = |module: &str| name.strip_prefix(module).is_some_and(|rest| rest.starts_with(".weight"));
            match quantized.iter().find(|(module, _)| of_quantized(module)) {
                None => entries.push(Entry {
                    name: name.to_string(),
                    dtype: view.dtype.to_string(),
                    shape: view.shape.clone(),
                    bytes: view.data.len() as u64,
                }),
                Some((module, kind)) => {
                    let weight = format!("{module}.weight");
                    // The weight's own tensor opens the entry, its statistics are added to it.
                    if !entries.iter().any(|entry| entry.name == weight) {
                        let state = checkpoint.get(&format!("{module}{QUANT_STATE}{kind}"));
                        let shape = state.and_then(|state| shape_of(state.data)).unwrap_or_default();
                        entries.push(Entry { name: weight.clone(), dtype: kind.to_uppercase(), shape, bytes: 0 });
                    }
                    if let Some(entry) = entries.iter_mut().find(|entry| entry.name == weight) {
                        entry.bytes += view.data.len() as u64;
                    }
                }
            }
        }
        Self { entries }
    }

    /// Parameters and bytes in words.
    pub fn totals(&self) -> String {
        let parameters = self.entries.iter().map(Entry::parameters).sum();
        let bytes = self.entries.iter().map(|entry| entry.bytes).sum();
        format!("{} parameters, {}", count(parameters), memory(bytes))
    }

    /// A table of all tensors, or of groups of equal ones.
    pub fn table(&self, all: bool) -> Table {
        let mut table = Table::new(["tensor", "count", "dtype", "shape", "parameters", "size"]);
        let mut groups: Vec<(String, &Entry, u64)> = Vec::new();
        for entry in &self.entries {
            let name = if all { entry.name.clone() } else { group_name(&entry.name) };
            let same = |group: &&mut (String, &Entry, u64)| {
                group.0 == name && group.1.dtype == entry.dtype && group.1.shape == entry.shape
            };
            match groups.iter_mut().find(same) {
                Some(group) => group.2 += 1,
                None => groups.push((name, entry, 1)),
            }
        }
        for (name, entry, n) in groups {
            table.row([
                name,
                n.to_string(),
                entry.dtype.clone(),
                format!("{:?}", entry.shape),
                count(n * entry.parameters()),
                memory(n * entry.bytes),
            ]);
        }
        table
    }
}

/// A path with its layer numbers as `*`.
pub fn group_name(path: &str) -> String {
    let parts = path.split('.').map(|part| if part.parse::<usize>().is_ok() { "*" } else { part });
    parts.collect::<Vec<_>>().join(".")
}

/// The shape in a quant state's JSON.
fn shape_of(json: &[u8]) -> Option<Vec<usize>> {
    let state: Value = serde_json::from_slice(json).ok()?;
    state.get("shape")?.as_array()?.iter().map(|size| size.as_u64().map(|size| size as usize)).collect()
}
