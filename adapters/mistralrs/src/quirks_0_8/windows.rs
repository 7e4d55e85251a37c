//! Sliding windows. With a window of W tokens, mistral.rs 0.8.1 lets a query of the prompt see W + 1 keys
//! (`make_swa_mask`), and a query of the answer W keys, which are all that its cache keeps. Both use the same number.
//!
//! So mistral.rs gets W - 1, which makes the prompt correct, and each layer's cache is replaced by one that keeps W
//! keys. A layer with full attention gets a cache that keeps everything: in Gemma 2 mistral.rs gives all layers a cache
//! for a window. The types of these caches are not public, but an empty cache holds nothing except its size, so a clone
//! of another model's cache serves.

use candle_core::Device;
use monteclora_converters::architecture::ModelShape;
use serde_json::json;

use super::logger_threads::tiny_model;
use crate::loader::SharedPipeline;

/// Gives each layer of a model that was loaded with its window minus 1 the cache that `shape` needs. It must run before
/// an engine has the model, on a thread that may block.
///
/// # Errors
/// Returns an error if the models that provide the caches cannot be loaded, or if the number of layers differs from
/// `shape`.
pub(crate) fn restore_caches(
    pipeline: &SharedPipeline,
    shape: &ModelShape,
    device: &Device,
) -> anyhow::Result<()> {
    let donor = |window: Option<usize>| {
        let changes = json!({
            "architectures": ["MistralForCausalLM"],
            "sliding_window": window,
            "max_position_embeddings": shape.max_position_embeddings,
        });
        tiny_model(device, changes)
    };
    let mut donors = Vec::new();
    for layer in &shape.layers {
        if donors.iter().all(|(window, _)| *window != layer.window) {
            donors.push((layer.window, donor(layer.window)?));
        }
    }
    let model = pipeline.blocking_lock();
    let mut caches = model.cache().normal();
    anyhow::ensure!(
        caches.0.len() == shape.layers.len(),
        "{} caches for {} layers",
        caches.0.len(),
        shape.layers.len()
    );
    for (cache, layer) in caches.0.iter_mut().zip(&shape.layers) {
        let donor = donors.iter().find(|(window, _)| *window == layer.window);
        if let Some((_, donor)) = donor {
            let donor = donor.blocking_lock();
            let of_donor = donor.cache().normal();
            *cache = of_donor.0[0].clone();
        }
    }
    Ok(())
}
