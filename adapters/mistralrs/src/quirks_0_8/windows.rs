//! Sliding windows: with a window of W tokens mistral.rs 0.8.1 lets a query of the prompt see W + 1 keys (`make_swa_mask`), and one of the
//! answer W, which are all that its cache keeps. There is one number for both.
//!
//! So it is told W - 1, which makes the prompt right, and each layer's cache is exchanged for one that keeps W, or everything where the
//! layer sees everything: Gemma 2's layers all have a cache for a window. mistral.rs does not let its caches be named from outside; an
//! empty one holds nothing but its size, though, and a clone of another model's is as good.

use candle_core::Device;
use monteclora_converters::architecture::ModelShape;
use serde_json::json;

use super::logger_threads::tiny_model;
use crate::loader::SharedPipeline;

/// Gives each layer of a model that was told its window less 1 the cache that `shape` asks for. To be called before an engine has the
/// model, from a thread that may block.
///
/// # Errors
/// If the models that caches are taken from cannot be loaded, or the model has other layers than `shape`.
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
