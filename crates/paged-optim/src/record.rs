//! A parameter's state in the records of Burn's optimizers.
//!
//! Burn names the entries of a record `"{parameter id}.{field}"`. The fields here are
//!
//! | field | what |
//! |---|---|
//! | `updates` | number of updates of the parameter so far |
//! | `m`, and `v` for AdamW | a moment in f32, of the parameter's shape |
//! | `m_codes`, `v_codes` | a moment in 8 bits, of the parameter's shape |
//! | `m_absmax`, `v_absmax` | its absmax, one for each [`BLOCKSIZE`](crate::BLOCKSIZE) codes |
//!
//! Both forms of the optimizers write and read these, so a record of one can be loaded into the other.

use burn::optim::{OptimizerRecord, StateSink, StateSource};
use burn::tensor::{Bytes, Element, TensorData};
use burn_pack::{Reader, Scalar, Tensor as Entry, Writer};

use crate::{Moment, Moments, OptimError, OptimizerKind};

/// State of a parameter on the host.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct HostState {
    /// Updates so far.
    pub(crate) updates: u64,
    /// Shape of the parameter.
    pub(crate) shape: Vec<usize>,
    pub(crate) moments: Moments,
}

const UPDATES: &str = "updates";

/// Names of the moments of every kind.
const MOMENTS: [&str; 2] = ["m", "v"];

impl HostState {
    pub(crate) fn flatten(&self, prefix: &str, out: &mut StateSink) {
        out.push_scalar(prefix, UPDATES, Scalar::from(self.updates));
        for (name, moment) in MOMENTS.iter().zip(&self.moments) {
            match moment {
                Moment::Full(values) => {
                    out.push_tensor(prefix, name, TensorData::new(values.clone(), self.shape.clone()));
                }
                Moment::Block8 { codes, absmax } => {
                    let codes = TensorData::new(codes.clone(), self.shape.clone());
                    out.push_tensor(prefix, &format!("{name}_codes"), codes);
                    let absmax = TensorData::new(absmax.clone(), [absmax.len()]);
                    out.push_tensor(prefix, &format!("{name}_absmax"), absmax);
                }
            }
        }
    }

    /// What [`flatten`](Self::flatten) wrote; `None` where there is nothing of the kind.
    pub(crate) fn unflatten(prefix: &str, from: &mut StateSource) -> Option<Self> {
        let updates = u64::try_from(from.take_scalar(prefix, UPDATES)?).ok()?;
        let mut shape = None;
        let mut moments = Moments::new();
        for name in MOMENTS {
            if let Some(values) = from.take_tensor(prefix, name) {
                shape.get_or_insert(values.shape().to_vec());
                moments.push(Moment::Full(elements(values)?));
            } else if let Some(codes) = from.take_tensor(prefix, &format!("{name}_codes")) {
                shape.get_or_insert(codes.shape().to_vec());
                let absmax = elements(from.take_tensor(prefix, &format!("{name}_absmax"))?)?;
                moments.push(Moment::Block8 { codes: elements(codes)?, absmax });
            }
        }
        Some(Self { updates, shape: shape?, moments })
    }
}

/// The data, if they are of this type.
fn elements<E: Element>(data: TensorData) -> Option<Vec<E>> {
    if data.dtype() == E::dtype() { data.try_into_vec().ok() } else { None }
}

/// A parameter's entries in a record.
#[derive(Clone, Debug)]
pub(crate) struct RecordedState {
    pub(crate) id: u64,
    pub(crate) path: Option<String>,
    pub(crate) state: HostState,
}

/// Under this name Burn's `ModuleOptimizer` records and expects the number of a parameter's dimensions.
const RANK: &str = "__rank";

/// The record of these parameters, in the order of their ids.
pub(crate) fn write(states: impl IntoIterator<Item = RecordedState>) -> Result<OptimizerRecord, OptimError> {
    let mut states: Vec<RecordedState> = states.into_iter().collect();
    states.sort_by_key(|state| state.id);
    let mut entries = Vec::new();
    let (mut scalars, mut paths) = (Vec::new(), Vec::new());
    for RecordedState { id, path, state } in states {
        let prefix = id.to_string();
        let mut sink = StateSink::default();
        state.flatten(&prefix, &mut sink);
        sink.push_scalar(&prefix, RANK, Scalar::from(state.shape.len()));
        scalars.append(&mut sink.scalars);
        paths.extend(path.map(|path| (prefix, path)));
        entries.extend(sink.tensors.into_iter().map(|(name, data)| {
            let (bytes, shape, dtype) = data.into_parts();
            Entry::new(name, dtype, shape, Some(id), bytes)
        }));
    }
    let writer = Writer::new(entries);
    let writer = scalars.iter().fold(writer, |writer, (name, value)| writer.with_scalar(name, *value));
    let writer = paths.iter().fold(writer, |writer, (id, path)| writer.with_metadata(id, path));
    // A record can't be built but from bytes.
    let bytes = writer.into_bytes().map_err(unreadable)?;
    OptimizerRecord::from_bytes(bytes).map_err(unreadable)
}

/// The parameters in a record, by id.
pub(crate) fn read(record: OptimizerRecord, kind: OptimizerKind) -> Result<Vec<RecordedState>, OptimError> {
    let bytes: Bytes = record.into_bytes().map_err(unreadable)?;
    let reader = Reader::from_bytes(bytes).map_err(unreadable)?;
    let mut source = StateSource::new(reader.scalars().clone());
    let paths = reader.metadata().clone();
    let mut ids = Vec::new();
    for entry in reader.into_tensors().map_err(unreadable)? {
        let (name, dtype, shape, id, bytes) = entry.into_parts().map_err(unreadable)?;
        let id = id.ok_or_else(|| OptimError::Record(format!("{name} belongs to no parameter")))?;
        ids.push(id);
        source.insert_tensor(name, TensorData::from_bytes(bytes, shape, dtype));
    }
    ids.sort_unstable();
    ids.dedup();
    let state = |id: u64| {
        let path = paths.get(&id.to_string()).cloned();
        let parameter = path.clone().unwrap_or_else(|| id.to_string());
        let state = HostState::unflatten(&id.to_string(), &mut source);
        // Another optimizer of Burn's has other fields.
        let state = state.ok_or(OptimError::Kind { parameter, kind })?;
        Ok(RecordedState { id, path, state })
    };
    ids.into_iter().map(state).collect()
}

fn unreadable(error: impl std::fmt::Display) -> OptimError {
    OptimError::Record(error.to_string())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn recorded(id: u64, moments: Moments) -> RecordedState {
        RecordedState {
            id,
            path: Some(format!("layer.{id}")),
            state: HostState { updates: 3, shape: vec![2, 2], moments },
        }
    }

    #[test]
    fn what_goes_in_comes_out() {
        let full = || Moment::Full(vec![1.0, -2.0, 3.5, f32::MIN_POSITIVE]);
        let block8 = || Moment::Block8 { codes: vec![1, 2, 3, 255], absmax: vec![0.25] };
        let states = [
            recorded(7, vec![full(), full()]),
            recorded(3, vec![block8(), block8()]),
            recorded(u64::MAX, vec![block8()]),
        ];
        let read = read(write(states.clone()).unwrap(), OptimizerKind::AdamW8bit).unwrap();
        for state in states {
            let found = read.iter().find(|found| found.id == state.id).unwrap();
            assert_eq!((&found.path, &found.state), (&state.path, &state.state));
        }
    }

    #[test]
    fn a_state_without_its_absmax_is_refused() {
        let mut sink = StateSink::default();
        recorded(7, vec![Moment::Block8 { codes: vec![0; 4], absmax: vec![0.0] }]).state.flatten("7", &mut sink);
        let mut source = StateSource::new(sink.scalars.into_iter().collect());
        for (name, data) in sink.tensors.into_iter().filter(|(name, _)| !name.ends_with("absmax")) {
            source.insert_tensor(name, data);
        }
        assert_eq!(HostState::unflatten("7", &mut source), None);
    }
}
