//! Gradients through the memory of the hosts, over the group's own connections.
//!
//! Each part goes as one vector: the gradients of all parameters, for each parameter whether there is one, and for each micro-batch of the
//! step what it sends: its loss, and figures where there are some. What a part has not is -0.0, which changes nothing in a sum: x + -0.0 is x for every x, zeros of either sign
//! included.

use burn::tensor::{DType, Device, Tensor, TensorData};
use host_copies::DeviceError;
use qlora_dist::Group;

use super::{Part, Summed};
use crate::error::TrainError;

/// What a sum does not notice.
const NOTHING: f32 = -0.0;

/// Sums the parts of all ranks in the order of their numbers. `shapes` are those of the parameters, `sent` is how many micro-batches there
/// are on all ranks and how many numbers each sends. Every rank gets the same bits.
///
/// # Errors
/// Another rank failed, or the device did.
pub(super) fn sum(
    group: &Group,
    parts: Vec<Part>,
    shapes: &[[usize; 2]],
    sent: [usize; 2],
    device: &Device,
) -> Result<Summed, TrainError> {
    let elements: usize = shapes.iter().map(|[rows, cols]| rows * cols).sum();
    let len = elements + shapes.len() + sent[0] * sent[1];
    let vectors = parts.into_iter().map(|part| Ok((part.number, flat(part, shapes, sent)?)));
    let vectors = vectors.collect::<Result<Vec<(usize, Vec<f32>)>, TrainError>>()?;
    let views: Vec<(usize, &[f32])> = vectors.iter().map(|(number, vector)| (*number, &vector[..])).collect();
    let sum = group.sum_parts(&views, len)?;
    drop(vectors);
    let (values, rest) = sum.split_at(elements);
    let (present, losses) = rest.split_at(shapes.len());
    let mut start = 0;
    let mut grads = Vec::with_capacity(shapes.len());
    for (shape, present) in shapes.iter().zip(present) {
        let end = start + shape[0] * shape[1];
        let data = || TensorData::new(values[start..end].to_vec(), *shape);
        grads.push((*present > 0.0).then(|| Tensor::from_data(data(), (device, DType::F32))));
        start = end;
    }
    let on_device = |of: &[f32]| Tensor::from_data(TensorData::new(of.to_vec(), [of.len()]), (device, DType::F32));
    let losses = losses.chunks(sent[1].max(1)).map(on_device).collect();
    Ok(Summed { losses, grads })
}

/// A part as one vector.
fn flat(part: Part, shapes: &[[usize; 2]], [count, width]: [usize; 2]) -> Result<Vec<f32>, TrainError> {
    let mut vector = Vec::new();
    let mut present = Vec::with_capacity(shapes.len());
    for (grad, [rows, cols]) in part.grads.into_iter().zip(shapes) {
        present.push(if grad.is_some() { 1.0 } else { NOTHING });
        match grad {
            Some(grad) => vector.extend(grad.try_into_vec_as::<f32>().map_err(DeviceError::from)?),
            None => vector.resize(vector.len() + rows * cols, NOTHING),
        }
    }
    vector.extend(present);
    let first = vector.len();
    vector.resize(first + count * width, NOTHING);
    for (number, sent) in part.losses {
        let sent = sent.try_into_vec_as::<f32>().map_err(DeviceError::from)?;
        let place = vector[first + number * width..].iter_mut().take(width);
        place.zip(sent).for_each(|(place, value)| *place = value);
    }
    Ok(vector)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use qlora_dist::{Place, Timeouts};

    #[test]
    fn what_a_part_has_not_leaves_no_trace() {
        let device = Device::flex();
        let tensor = |values: [f32; 2]| Some(Tensor::<2>::from_data([values], &device));
        let loss = |value: f32| Tensor::<1>::from_data([value, 2.0 * value], &device);
        let parts = vec![
            Part { number: 1, losses: vec![(1, loss(0.25))], grads: vec![None, None, tensor([2.0, -0.0])] },
            Part {
                number: 0,
                losses: vec![(0, loss(0.5))],
                grads: vec![tensor([-0.0, 1.0]), None, tensor([1.0, -0.0])],
            },
        ];
        let group = Group::join(Place::alone(), Timeouts::default()).unwrap();
        let Summed { losses, grads } = sum(&group, parts, &[[1, 2]; 3], [2, 2], &device).unwrap();
        let bits = |tensor: Tensor<2>| {
            tensor.try_into_vec_as::<f32>().unwrap().iter().map(|v| v.to_bits()).collect::<Vec<_>>()
        };
        let grads: Vec<_> = grads.into_iter().map(|grad| grad.map(bits)).collect();
        let of = |values: [f32; 2]| Some(values.map(f32::to_bits).to_vec());
        assert_eq!(grads, [of([-0.0, 1.0]), None, of([3.0, -0.0])]);
        let losses: Vec<Vec<f32>> = losses.into_iter().map(|loss| loss.try_into_vec_as().unwrap()).collect();
        assert_eq!(losses, [[0.5, 1.0], [0.25, 0.5]]);
    }
}
