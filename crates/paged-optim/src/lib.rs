//! AdamW and Lion over Burn tensors: one kernel for many parameters, 8-bit state, and a pager that moves state to
//! host memory when the device is short of it.
//!
//! # Update rules
//!
//! AdamW (Loshchilov and Hutter, 2019, arXiv 1711.05101, algorithm 2), operation by operation PyTorch's:
//!
//! ```text
//! p ← p − lr · weight_decay · p
//! m ← β₁ m + (1 − β₁) g
//! v ← β₂ v + (1 − β₂) g²
//! p ← p − lr / (1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + ε)
//! ```
//!
//! Lion (Chen et al., 2023, arXiv 2302.06675, algorithm 2):
//!
//! ```text
//! p ← p − lr · weight_decay · p − lr · sign(β₁ m + (1 − β₁) g)
//! m ← β₂ m + (1 − β₂) g
//! ```
//!
//! `g` is the gradient times the factor of clipping by global norm ([`Clip`]). The scalar factors are computed in f64
//! on the host and rounded once; the arithmetic on the elements is f32.
//!
//! # 8-bit state
//!
//! Block-wise quantization (Dettmers et al., 2022, arXiv 2110.02861): 256 consecutive values of a moment share their
//! absmax in f32, and each is the nearest entry of a 256-entry map times it ([`dynamic_map`]): the signed one for m,
//! the unsigned one for v. An update dequantizes, applies the rule in f32, moves the parameter by the *unrounded*
//! moments, and quantizes them again, as bitsandbytes does. Parameters below 4096 elements keep 32-bit state
//! ([`OptimizerConfig::min_8bit_size`]).
//!
//! | | state, bytes per parameter | traffic of an update, bytes per parameter |
//! |---|---|---|
//! | AdamW 32-bit | 8 | 28: reads p, g, m, v; writes p, m, v |
//! | AdamW 8-bit | 2 + 8/256 | 16.06: reads p, g, codes and absmax of m and v; writes all but g |
//! | Lion 8-bit | 1 + 4/256 | 14.03 |
//!
//! The update does a few dozen operations a parameter (two searches of eight steps in a table, for 8 bits), so
//! memory bounds it: no implementation takes less time than that traffic at the device's bandwidth.
//!
//! # Forms
//!
//! | form | launches | state |
//! |---|---|---|
//! | [`PagedAdamWConfig::init`], [`PagedLionConfig::init`]: Burn's `ModuleOptimizer`, for Burn's loops and `burn-train` | one per parameter | on the device |
//! | [`PagedAdamWConfig::init_paged`], [`PagedLionConfig::init_paged`]: [`PagedOptimizer`], of a whole module | one for many parameters | in pages, within a [`Budget`] |
//! | [`Optimizer`]: of a list of tensors, for loops that have no module | one for many parameters | in pages, within a [`Budget`] |
//!
//! All give the same bits. A record of one of the first two can be loaded into the other.
//!
//! ```
//! use burn::module::ParamGroup;
//! use burn::nn::LinearConfig;
//! use burn::optim::GradientsParams;
//! use burn::tensor::{Device, Tensor};
//! use paged_optim::PagedAdamWConfig;
//!
//! let device = Device::flex().autodiff();
//! let mut model = LinearConfig::new(8, 2).init(&device);
//! let mut optimizer = PagedAdamWConfig::new()
//!     .with_weight_decay(0.01)
//!     .init_paged()
//!     .with_group(ParamGroup::from_predicate("bias"), 1.0, 0.0)
//!     .with_max_grad_norm(1.0);
//! for _ in 0..3 {
//!     let loss = model.forward(Tensor::<2>::ones([4, 8], &device)).square().mean();
//!     let grads = GradientsParams::from_grads(loss.backward(), &model);
//!     model = optimizer.try_step(1e-2, model, grads)?;
//! }
//! # Ok::<(), paged_optim::OptimError>(())
//! ```
//!
//! # One launch for many parameters
//!
//! State lives in pages, each one buffer with the state of consecutive parameters, and of a slice of a parameter
//! where that is larger than what is left of a page. A page is updated by few launches, each over several
//! parameters (as many as the runtime lets a kernel bind, and of the same learning rate, weight decay and number of
//! updates); parameters are updated in place. Clipping and weight decay are part of the launch. The norm is read on
//! the device, so nothing waits for the host; where the norm is not finite, nothing is changed.
//!
//! # Paging
//!
//! See [`Budget`]: which pages are on the device is decided anew at every step, by a figure or by what the driver has
//! left. Results do not depend on it, nor on how state is cut into pages: blocks of 256 are never cut.
//!
//! # What was not done
//!
//! Momentum in bf16, percentile clipping and stochastic rounding of bitsandbytes; parameters that are not f32; a module
//! on several devices. Burn's own AdamW differs in its defaults (ε is 1e-5 and weight decay 1e-4 there) and clips each
//! tensor by itself. Its `ModuleOptimizer` has no place for state that is shared by parameters, so the pager works in
//! the other two forms only.

mod budget;
mod clip;
mod config;
mod device;
pub mod dynamic_map;
mod error;
mod layout;
mod module;
mod module_config;
mod moments;
mod optimizer;
mod pager;
mod record;
pub mod reference;
mod tensorwise;

pub use budget::{Budget, MemorySource};
pub use clip::{Clip, clip_factor, global_norm};
pub use config::{OptimizerConfig, OptimizerKind, Scalars};
pub use error::OptimError;
pub use host_copies::free_memory;
pub use module::PagedOptimizer;
pub use module_config::{PagedAdamWConfig, PagedLionConfig};
pub use moments::{Moment, Moments};
pub use optimizer::{Optimizer, Update};
pub use pager::Paging;
pub use tensorwise::{TensorState, TensorwiseOptimizer};

/// Consecutive values of a moment that share one absmax.
pub const BLOCKSIZE: usize = 256;
