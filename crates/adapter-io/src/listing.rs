//! The tensors of a checkpoint as people speak of them: layers summed up, a 4-bit weight as what it stands for.

use std::collections::HashMap;

use serde_json::Value;

use crate::checkpoint::Checkpoint;

/// Suffix of the JSON tensor that bitsandbytes puts beside a 4-bit weight, before the type.
const QUANT_STATE: &str = ".weight.quant_state.bitsandbytes__";
/// The other tensors of one.
const PARTS: [&str; 5] =
    [".weight", ".weight.absmax", ".weight.quant_map", ".weight.nested_absmax", ".weight.nested_quant_map"];

/// A tensor, or a 4-bit weight with its statistics.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedTensor {
    /// Its name, as the file has it: see [`printable`](crate::printable::printable).
    pub name: String,
    /// Its data type; the storage's name for weights in another one than plain floats: `NF4`, `FP8`, `GPTQ`.
    pub dtype: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its bytes, with those of its statistics.
    pub bytes: u64,
}

impl ListedTensor {
    /// The number of elements. A 4-bit weight's shape is a claim of the file: at most [`u64::MAX`].
    pub fn parameters(&self) -> u64 {
        self.shape.iter().fold(1, |n: u64, size| n.saturating_mul(*size as u64))
    }
}

/// Tensors of the same name, but for layer numbers, type and shape.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedGroup {
    /// The first of them, with [`group_name`] as its name and the bytes of all.
    pub tensor: ListedTensor,
    /// How many.
    pub count: u64,
}

/// The tensors of a checkpoint in the order of their names.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Listing {
    tensors: Vec<ListedTensor>,
}

impl Listing {
    /// Lists a checkpoint, in time linear in its headers.
    pub fn new(checkpoint: &Checkpoint) -> Self {
        let mut tensors: Vec<ListedTensor> = Vec::new();
        let quantized: HashMap<&str, &str> =
            checkpoint.names().filter_map(|name| name.split_once(QUANT_STATE)).collect();
        let module_of = |name: &str| {
            let module = name.split_once(QUANT_STATE).map(|(module, _)| module);
            let known = |module: &&str| quantized.contains_key(module);
            let found = module.or_else(|| PARTS.iter().find_map(|part| name.strip_suffix(part).filter(known)));
            found.and_then(|module| quantized.get_key_value(module)).map(|(module, kind)| (*module, *kind))
        };
        let mut weights: HashMap<&str, usize> = HashMap::new();
        for name in checkpoint.names() {
            if let (Some((kind, bytes)), Ok(tensor)) = (checkpoint.coded(name), checkpoint.dense(name)) {
                tensors.push(ListedTensor { name: name.into(), dtype: kind.into(), shape: tensor.shape, bytes });
                continue;
            }
            let (Some(view), of_weight) = (checkpoint.get(name), module_of(name)) else { continue };
            let bytes = view.data.len() as u64;
            let Some((module, kind)) = of_weight else {
                tensors.push(ListedTensor {
                    name: name.into(),
                    dtype: view.dtype.to_string(),
                    shape: view.shape,
                    bytes,
                });
                continue;
            };
            let at = *weights.entry(module).or_insert_with(|| {
                let state = checkpoint.get(&format!("{module}{QUANT_STATE}{kind}"));
                let shape = state.and_then(|state| shape_of(state.data)).unwrap_or_default();
                let name = format!("{module}.weight");
                tensors.push(ListedTensor { name, dtype: kind.to_uppercase(), shape, bytes: 0 });
                tensors.len() - 1
            });
            tensors[at].bytes += bytes;
        }
        Self { tensors }
    }

    /// These tensors, in this order.
    pub fn from_tensors(tensors: Vec<ListedTensor>) -> Self {
        Self { tensors }
    }

    /// All of them.
    pub fn tensors(&self) -> &[ListedTensor] {
        &self.tensors
    }

    /// Equal ones of all layers together, in the order of the first.
    pub fn groups(&self) -> Vec<ListedGroup> {
        let mut groups: Vec<ListedGroup> = Vec::new();
        let mut known: HashMap<(String, &str, &[usize]), usize> = HashMap::new();
        for tensor in &self.tensors {
            let key = (group_name(&tensor.name), tensor.dtype.as_str(), tensor.shape.as_slice());
            let name = key.0.clone();
            let at = *known.entry(key).or_insert_with(|| {
                groups.push(ListedGroup { tensor: ListedTensor { name, bytes: 0, ..tensor.clone() }, count: 0 });
                groups.len() - 1
            });
            groups[at].count += 1;
            groups[at].tensor.bytes += tensor.bytes;
        }
        groups
    }

    /// The elements of all of them.
    pub fn parameters(&self) -> u64 {
        self.tensors.iter().fold(0, |sum, tensor| sum.saturating_add(tensor.parameters()))
    }

    /// Their bytes.
    pub fn bytes(&self) -> u64 {
        self.tensors.iter().map(|tensor| tensor.bytes).sum()
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
