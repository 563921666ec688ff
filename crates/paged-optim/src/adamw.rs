//! AdamW with 32-bit state.

use burn::tensor::{DType, Device, Tensor, TensorData};
use serde::{Deserialize, Serialize};

/// Hyper-parameters; the defaults are PyTorch's, without weight decay.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdamWConfig {
    /// Decay rates of the first and second moment.
    pub betas: (f64, f64),
    /// Added to the denominator.
    pub eps: f64,
    /// Decoupled weight decay per unit of learning rate.
    pub weight_decay: f64,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self { betas: (0.9, 0.999), eps: 1e-8, weight_decay: 0.0 }
    }
}

/// What can be wrong with optimizer state that comes from outside.
#[derive(Debug, thiserror::Error)]
pub enum OptimError {
    /// The number of saved moments is not the number of parameters.
    #[error("optimizer state holds {found} parameters, the model trains {expected}: it belongs to another run")]
    Count {
        /// Parameters of the model.
        expected: usize,
        /// Parameters in the state.
        found: usize,
    },
    /// A saved moment has another shape than its parameter.
    #[error("optimizer state of parameter {index}: expected {expected} values, found {found}")]
    Length {
        /// Position of the parameter.
        index: usize,
        /// Values of the parameter.
        expected: usize,
        /// Values in the state.
        found: usize,
    },
}

/// First and second moment of one parameter on the host, row-major f32.
#[derive(Clone, Debug, PartialEq)]
pub struct Moments {
    /// Running mean of gradients.
    pub m: Vec<f32>,
    /// Running mean of squared gradients.
    pub v: Vec<f32>,
}

/// Optimizer state: one pair of moments per parameter, and the number of updates so far.
#[derive(Debug)]
pub struct AdamW {
    config: AdamWConfig,
    updates: u64,
    moments: Vec<(Tensor<2>, Tensor<2>)>,
}

impl AdamW {
    /// Zero state for parameters of the given shapes.
    pub fn new(config: AdamWConfig, shapes: &[[usize; 2]], device: &Device) -> Self {
        let zeros = |&shape: &[usize; 2]| Tensor::zeros(shape, (device, DType::F32));
        Self { config, updates: 0, moments: shapes.iter().map(|shape| (zeros(shape), zeros(shape))).collect() }
    }

    /// Updates so far.
    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// Bytes of state on the device.
    pub fn state_bytes(&self) -> usize {
        self.moments.iter().map(|(m, v)| 4 * (m.shape().num_elements() + v.shape().num_elements())).sum()
    }

    /// Begins the next update; call [`update`](Self::update) for each parameter after it.
    pub fn begin_step(&mut self) {
        self.updates += 1;
    }

    /// The updated parameter number `index`.
    ///
    /// # Shapes
    /// `param` and `grad` have the shape given to [`new`](Self::new), f32, without autodiff.
    pub fn update(&mut self, index: usize, param: Tensor<2>, grad: Tensor<2>, learning_rate: f64) -> Tensor<2> {
        debug_assert!(self.updates > 0, "begin_step comes before update");
        let AdamWConfig { betas: (beta1, beta2), eps, weight_decay } = self.config;
        let (m, v) = self.moments[index].clone();
        let m = m.mul_scalar(beta1) + grad.clone().mul_scalar(1.0 - beta1);
        let v = v.mul_scalar(beta2) + grad.square().mul_scalar(1.0 - beta2);
        self.moments[index] = (m.clone(), v.clone());
        let step = self.updates as f64;
        let (correction1, correction2) = (1.0 - beta1.powf(step), 1.0 - beta2.powf(step));
        let denominator = v.sqrt().div_scalar(correction2.sqrt()).add_scalar(eps);
        let param = match weight_decay {
            0.0 => param,
            decay => param.mul_scalar(1.0 - learning_rate * decay),
        };
        param - (m / denominator).mul_scalar(learning_rate / correction1)
    }

    /// The state, read back from the device.
    pub fn state(&self) -> Vec<Moments> {
        let host = |tensor: &Tensor<2>| tensor.clone().into_data_as::<f32>().iter::<f32>().collect();
        self.moments.iter().map(|(m, v)| Moments { m: host(m), v: host(v) }).collect()
    }

    /// Puts back what [`state`](Self::state) gave after `updates` updates.
    ///
    /// # Errors
    /// [`OptimError`] when the state does not fit the parameters; nothing is changed then.
    pub fn restore(&mut self, updates: u64, state: Vec<Moments>) -> Result<(), OptimError> {
        if state.len() != self.moments.len() {
            return Err(OptimError::Count { expected: self.moments.len(), found: state.len() });
        }
        for (index, (saved, (m, _))) in state.iter().zip(&self.moments).enumerate() {
            let expected = m.shape().num_elements();
            if let Some(&found) = [saved.m.len(), saved.v.len()].iter().find(|&&len| len != expected) {
                return Err(OptimError::Length { index, expected, found });
            }
        }
        for (saved, slot) in state.into_iter().zip(&mut self.moments) {
            let (shape, device) = (slot.0.dims(), slot.0.device());
            let upload = |values: Vec<f32>| Tensor::from_data(TensorData::new(values, shape), (&device, DType::F32));
            *slot = (upload(saved.m), upload(saved.v));
        }
        self.updates = updates;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The formulas of the crate's documentation in f64.
    fn oracle(config: AdamWConfig, learning_rate: f64, start: &[f64], grads: &[Vec<f64>]) -> Vec<f64> {
        let (beta1, beta2) = config.betas;
        let (mut p, mut m, mut v) = (start.to_vec(), vec![0.0; start.len()], vec![0.0; start.len()]);
        for (t, grad) in grads.iter().enumerate() {
            let t = (t + 1) as i32;
            for i in 0..p.len() {
                p[i] -= learning_rate * config.weight_decay * p[i];
                m[i] = beta1 * m[i] + (1.0 - beta1) * grad[i];
                v[i] = beta2 * v[i] + (1.0 - beta2) * grad[i] * grad[i];
                let denominator = v[i].sqrt() / (1.0 - beta2.powi(t)).sqrt() + config.eps;
                p[i] -= learning_rate / (1.0 - beta1.powi(t)) * m[i] / denominator;
            }
        }
        p
    }

    fn tensor(values: &[f64], device: &Device) -> Tensor<2> {
        let values: Vec<f32> = values.iter().map(|&v| v as f32).collect();
        Tensor::from_data(TensorData::new(values, [2, 3]), (device, DType::F32))
    }

    fn grads() -> Vec<Vec<f64>> {
        (0..10)
            .map(|t| (0..6).map(|i| ((t * 7 + i * 13) % 11) as f64 * 0.1 - 0.5 + 1e-6 * i as f64).collect())
            .collect()
    }

    #[test]
    fn ten_updates_match_the_formulas() {
        let device = Device::flex();
        let start = [0.3, -0.2, 0.0, 1.0, -1.0, 0.5];
        for weight_decay in [0.0, 0.1] {
            let config = AdamWConfig { weight_decay, ..Default::default() };
            let mut optimizer = AdamW::new(config, &[[2, 3]], &device);
            let mut param = tensor(&start, &device);
            for grad in &grads() {
                optimizer.begin_step();
                param = optimizer.update(0, param, tensor(grad, &device), 1e-2);
            }
            let found: Vec<f32> = param.into_data().iter::<f32>().collect();
            for (found, expected) in found.iter().zip(oracle(config, 1e-2, &start, &grads())) {
                // Ten updates of about 1e-2 in f32: a few ulp of 1.0 each.
                assert!((f64::from(*found) - expected).abs() < 1e-6, "{found} against {expected}");
            }
        }
    }

    #[test]
    fn restored_state_continues_bit_for_bit() {
        let device = Device::flex();
        let start = tensor(&[0.3, -0.2, 0.0, 1.0, -1.0, 0.5], &device);
        let run = |stop: Option<usize>| {
            let mut optimizer = AdamW::new(AdamWConfig::default(), &[[2, 3]], &device);
            let mut param = start.clone();
            for (t, grad) in grads().iter().enumerate() {
                if stop == Some(t) {
                    let (updates, state) = (optimizer.updates(), optimizer.state());
                    optimizer = AdamW::new(AdamWConfig::default(), &[[2, 3]], &device);
                    optimizer.restore(updates, state).expect("same shapes");
                }
                optimizer.begin_step();
                param = optimizer.update(0, param, tensor(grad, &device), 1e-2);
            }
            param.into_data().iter::<f32>().map(f32::to_bits).collect::<Vec<_>>()
        };
        assert_eq!(run(None), run(Some(4)));
    }

    #[test]
    fn state_of_another_model_is_refused() {
        let mut optimizer = AdamW::new(AdamWConfig::default(), &[[2, 3]], &Device::flex());
        assert!(matches!(optimizer.restore(1, vec![]), Err(OptimError::Count { expected: 1, found: 0 })));
        let short = Moments { m: vec![0.0; 6], v: vec![0.0; 5] };
        assert!(matches!(optimizer.restore(1, vec![short]), Err(OptimError::Length { found: 5, .. })));
    }
}
