//! MonteCLoRA (arXiv:2411.04358) on candle: the posterior of a low-rank adapter, its noise, its divergences, and the frozen
//! projection that carries it.
//!
//! The posterior of a module is a Gaussian scale mixture around `lora_A`; `lora_B` is deterministic. The mathematics
//! takes noise as an argument; only [`noise`] generates it, counter-based. Gradients are exact vector-Jacobian products
//! written by hand, so that no gradient is computed for the frozen base.

pub mod device;
mod error;
pub mod linalg;
mod linear;
pub mod methods;
pub mod noise;
pub mod numbers;
pub mod product;
pub mod simd;
mod update;
pub mod weights;

pub use error::{Error, Result};
pub use linear::{Branch, FrozenLinear, input_gradient};
pub use methods::monteclora::sample;
pub use product::Precision;
pub use update::{LowRank, Pulled, Update};
