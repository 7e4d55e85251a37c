//! Draws of an adapter's posterior, ready to compute with.

use anyhow::Result;
use monteclora_converters::Adapter;

use crate::model::{ActiveAdapter, Decoder};

/// The first `n_draws` draws of `adapter`'s posterior under `seed`: the ones that `monteclora sample` writes. They share one B.
///
/// # Errors
/// For a plain LoRA, and for an adapter that does not fit the decoder.
pub fn posterior_draws(
    adapter: &Adapter,
    decoder: &Decoder,
    seed: u64,
    n_draws: usize,
) -> Result<Vec<ActiveAdapter>> {
    let (config, device) = (decoder.config(), decoder.device());
    let mean = ActiveAdapter::from_adapter(adapter, config, device)?;
    (0..n_draws as u64)
        .map(|index| {
            let drawn = monteclora_adapters::sample(adapter, seed, index)?;
            Ok(ActiveAdapter::from_draw(&drawn, &mean, config, device)?)
        })
        .collect()
}
