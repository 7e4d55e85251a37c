//! Draws of an adapter's posterior, ready to compute with.

use anyhow::Result;
use monteclora_converters::Adapter;

use crate::model::{ActiveAdapter, Decoder};

/// Default seed of draws.
pub const DEFAULT_SEED: u64 = 42;

/// The first `n_draws` draws of `adapter`'s posterior under `seed`, the same that `monteclora sample` writes. They
/// share one B.
///
/// # Errors
/// Returns an error if `adapter` has no posterior or does not fit the decoder.
pub fn posterior_draws(
    adapter: &Adapter,
    decoder: &Decoder,
    seed: u64,
    n_draws: usize,
) -> Result<Vec<ActiveAdapter>> {
    let mean = ActiveAdapter::from_adapter(adapter, decoder.config(), decoder.device())?;
    (0..n_draws)
        .map(|index| posterior_draw(adapter, &mean, decoder, seed, index))
        .collect()
}

/// Draw number `index` of [`posterior_draws`]. It shares B with `mean`, the posterior mean of `adapter`.
///
/// # Errors
/// As [`posterior_draws`].
pub fn posterior_draw(
    adapter: &Adapter,
    mean: &ActiveAdapter,
    decoder: &Decoder,
    seed: u64,
    index: usize,
) -> Result<ActiveAdapter> {
    let drawn = monteclora_adapters::sample(adapter, seed, index as u64)?;
    let (config, device) = (decoder.config(), decoder.device());
    Ok(ActiveAdapter::from_draw(&drawn, mean, config, device)?)
}
