//! Loads, swaps and unloads adapters while requests are answered.

use std::path::PathBuf;
use std::sync::Arc;

use mistralrs::MistralRs;

use super::model::MonteCloraModel;
use super::served::Served;
use crate::engine::{engine_error, wait_until_freed};
use crate::error::{Error, Result, code};
use crate::quirks_0_8::logger_threads::LAST_STEP;
use crate::quirks_0_8::split_models::allow_another_model;

impl MonteCloraModel {
    /// Loads the adapter in `source` and serves it under the new name `alias`.
    ///
    /// It takes the memory of one more copy of the model.
    ///
    /// # Errors
    /// Returns an error if the name is taken, or as [`MonteCloraLoader::load`](crate::MonteCloraLoader::load).
    pub async fn load_adapter(
        &self,
        alias: impl Into<String>,
        source: impl Into<PathBuf>,
    ) -> Result<()> {
        let alias = alias.into();
        let _change = self.changes.lock().await;
        if self.served.read().contains_key(&alias) {
            let message = format!("the name `{alias}` is already served; swap or unload it");
            return Err(Error::refused(code::NAME_TAKEN, message));
        }
        allow_another_model()?;
        let served = Arc::new(self.recipe.load(&alias, Some(source.into())).await?);
        self.recipe.add(&self.host, &served).await?;
        self.served.write().insert(alias, served);
        Ok(())
    }

    /// Serves the adapter in `source` under the name `alias`, in place of the current adapter of that name.
    ///
    /// The old adapter answers while the new one is loaded. Requests that have begun finish on the old adapter; later
    /// requests get the new one. Then the memory of the old adapter is freed. Until then both are in memory. On a CPU,
    /// requests wait for each other anyway. On an accelerator, new requests wait until the last requests of the old
    /// adapter have finished.
    ///
    /// The engine stays, so no thread is left behind and `mistralrs` knows the model under the same name.
    ///
    /// # Errors
    /// Returns an error if `alias` is not an adapter, or as [`MonteCloraLoader::load`](crate::MonteCloraLoader::load).
    /// The old adapter then continues to answer.
    pub async fn swap_adapter(&self, alias: &str, source: impl Into<PathBuf>) -> Result<()> {
        let _change = self.changes.lock().await;
        let served = self.adapter(alias)?;
        let other = self.recipe.load(alias, Some(source.into())).await?;
        let turns = served.all_turns().await.map_err(engine_error)?;
        // The closure also frees the old weights.
        let exchange = move || {
            let _turns = turns;
            served.model.exchange(&other.model, LAST_STEP)
        };
        tokio::task::spawn_blocking(exchange)
            .await
            .map_err(engine_error)?
            .map_err(|reason| {
                Error::Engine(format!(
                    "the weights of `{alias}` cannot be exchanged: {reason:?}"
                ))
            })
    }

    /// Stops serving the adapter `alias`. Requests that have begun, or that wait for their turn, finish first; then the
    /// memory is freed.
    ///
    /// If `alias` was the default model, the first remaining model becomes the default. mistral.rs leaves one sleeping
    /// thread behind.
    ///
    /// # Errors
    /// Returns an error if `alias` is not an adapter, or if it is the only model served.
    pub async fn unload_adapter(&self, alias: &str) -> Result<()> {
        let _change = self.changes.lock().await;
        let served = self.adapter(alias)?;
        let next = self
            .served
            .read()
            .keys()
            .find(|name| *name != alias)
            .cloned();
        let Some(next) = next else {
            let message = format!("`{alias}` is all that is served; swap it, or drop the model");
            return Err(Error::setting("alias", message));
        };
        if self
            .get_default_model_id()
            .map_err(engine_error)?
            .as_deref()
            == Some(alias)
        {
            self.set_default_model_id(&next).map_err(engine_error)?;
        }
        self.served.write().shift_remove(alias);
        // A separate task removes the model even if the caller stops waiting.
        tokio::spawn(remove(self.host.clone(), served))
            .await
            .map_err(engine_error)?
    }

    /// Finds the model served under `alias`, which must be an adapter.
    fn adapter(&self, alias: &str) -> Result<Arc<Served>> {
        let served = self.served.read().get(alias).cloned();
        let served = served.ok_or_else(|| Error::unknown_name(alias))?;
        if !served.is_adapter {
            let message = format!("`{alias}` is the base model, not an adapter");
            return Err(Error::setting("alias", message));
        }
        Ok(served)
    }
}

/// Removes the engine of `served` from `host` once it is idle, and waits until its memory is free.
async fn remove(host: Arc<MistralRs>, served: Arc<Served>) -> Result<()> {
    let turns = served.all_turns().await.map_err(engine_error)?;
    let weights = Arc::downgrade(served.model.shared());
    // `remove_model` blocks, which an asynchronous task must not do.
    let remove = move || {
        let _turns = turns;
        host.remove_model(&served.name).map_err(Error::Engine)?;
        drop(served);
        wait_until_freed(&weights)
    };
    tokio::task::spawn_blocking(remove)
        .await
        .map_err(engine_error)?
}
