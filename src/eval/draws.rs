//! Draws of an adapter's posterior, ready to compute with.

use anyhow::Result;
use monteclora_converters::Adapter;

use crate::model::{ActiveAdapter, Decoder};

/// The first `n_draws` draws of `adapter`'s posterior under `seed`: the ones that `monteclora sample` writes. They share one B.
///
/// # Errors
/// [`monteclora_adapters::Error::NoPosterior`] for a plain LoRA; an adapter that does not fit the decoder.
pub fn posterior_draws(
    adapter: &Adapter,
    decoder: &Decoder,
    seed: u64,
    n_draws: usize,
) -> Result<Vec<ActiveAdapter>> {
    let active = |adapter: &Adapter| {
        ActiveAdapter::from_adapter(adapter, decoder.config(), decoder.device())
    };
    let mean = active(adapter)?;
    (0..n_draws as u64)
        .map(|index| {
            let drawn = monteclora_adapters::sample(adapter, seed, index)?;
            Ok(active(&drawn)?.sharing_b(&mean))
        })
        .collect()
}
