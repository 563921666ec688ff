//! Configurations in the manner of Burn's own optimizers.
//!
//! The defaults are PyTorch's: Burn's AdamW has ε = 1e-5 and a weight decay of 1e-4, so a loop that relied on those
//! sets them.

use burn::config::Config;
use burn::grad_clipping::GradientClippingConfig;
use burn::optim::ModuleOptimizer;

use crate::{OptimizerConfig, OptimizerKind, PagedOptimizer, TensorwiseOptimizer};

/// Configuration of AdamW.
#[derive(Config, Debug)]
pub struct PagedAdamWConfig {
    /// Decay rate of the first moment.
    #[config(default = 0.9)]
    pub beta_1: f64,
    /// Decay rate of the second moment.
    #[config(default = 0.999)]
    pub beta_2: f64,
    /// Added to the denominator.
    #[config(default = 1e-8)]
    pub epsilon: f64,
    /// Decoupled weight decay per unit of learning rate.
    #[config(default = 0.0)]
    pub weight_decay: f64,
    /// Whether moments are kept in 8 bits, in blocks of [`BLOCKSIZE`](crate::BLOCKSIZE).
    #[config(default = false)]
    pub eight_bit: bool,
    /// Parameters with fewer elements keep 32-bit moments in any case.
    #[config(default = 4096)]
    pub min_8bit_size: usize,
    /// Clipping of each tensor's gradient, by value or by the norm of this tensor alone. For the norm of all gradients
    /// together see [`PagedOptimizer::with_max_grad_norm`].
    pub grad_clipping: Option<GradientClippingConfig>,
}

/// Configuration of Lion with 8-bit moments.
#[derive(Config, Debug)]
pub struct PagedLionConfig {
    /// Weight of the moment in the update.
    #[config(default = 0.9)]
    pub beta_1: f64,
    /// Decay rate of the moment.
    #[config(default = 0.99)]
    pub beta_2: f64,
    /// Decoupled weight decay per unit of learning rate.
    #[config(default = 0.0)]
    pub weight_decay: f64,
    /// Parameters with fewer elements keep 32-bit moments.
    #[config(default = 4096)]
    pub min_8bit_size: usize,
    /// Clipping of each tensor's gradient, by value or by the norm of this tensor alone. For the norm of all gradients
    /// together see [`PagedOptimizer::with_max_grad_norm`].
    pub grad_clipping: Option<GradientClippingConfig>,
}

impl From<&PagedAdamWConfig> for OptimizerConfig {
    fn from(config: &PagedAdamWConfig) -> Self {
        Self {
            kind: if config.eight_bit { OptimizerKind::AdamW8bit } else { OptimizerKind::AdamW32bit },
            betas: (config.beta_1, config.beta_2),
            eps: config.epsilon,
            weight_decay: config.weight_decay,
            min_8bit_size: config.min_8bit_size,
        }
    }
}

impl From<&PagedLionConfig> for OptimizerConfig {
    fn from(config: &PagedLionConfig) -> Self {
        Self {
            kind: OptimizerKind::Lion8bit,
            betas: (config.beta_1, config.beta_2),
            weight_decay: config.weight_decay,
            min_8bit_size: config.min_8bit_size,
            ..Self::default()
        }
    }
}

macro_rules! builders {
    ($config:ident) => {
        impl $config {
            /// The optimizer of one tensor at a time, for
            /// [`ModuleOptimizer::with_group`](burn::optim::ModuleOptimizer::with_group). As with Burn's own optimizers,
            /// clipping is not part of it.
            pub fn build(&self) -> TensorwiseOptimizer {
                TensorwiseOptimizer::new(self.into())
            }

            /// The optimizer for Burn's training loops: state stays on the device, with a launch for each parameter.
            pub fn init(&self) -> ModuleOptimizer {
                let optimizer = ModuleOptimizer::from(self.build());
                match &self.grad_clipping {
                    Some(clipping) => optimizer.with_grad_clipping(clipping.init()),
                    None => optimizer,
                }
            }

            /// The optimizer of a whole module: one launch for many parameters, and state that moves to host memory when
            /// the device is short of it.
            pub fn init_paged(&self) -> PagedOptimizer {
                let optimizer = PagedOptimizer::new(self.into());
                match &self.grad_clipping {
                    Some(clipping) => optimizer.with_grad_clipping(clipping.init()),
                    None => optimizer,
                }
            }
        }
    };
}

builders!(PagedAdamWConfig);
builders!(PagedLionConfig);
