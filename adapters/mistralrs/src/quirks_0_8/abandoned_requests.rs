//! Requests whose client has left. mistral.rs 0.8.1 treats a dropped receiver as a failure: it fails the whole batch
//! and stops the engine. So a receiver stays until its answer has arrived, and an answer that nobody waits for is
//! cancelled.

use mistralrs_core::{Request, TokenizationRequest};
use tokio::sync::mpsc::{Sender, channel};

use crate::engine::{engine_error, silent};
use crate::error::{Error, Result};

/// Asks an engine for the tokens of `request`. `engine` is the input of the engine; `request` gets the sender for the
/// response.
///
/// The engine may work longer than the caller waits; `held` is kept as long as the engine works.
pub(crate) async fn tokenize(
    engine: Sender<Request>,
    request: impl FnOnce(Sender<anyhow::Result<Vec<u32>>>) -> TokenizationRequest,
    held: impl Send + 'static,
) -> Result<Vec<u32>> {
    let (sender, mut receiver) = channel(1);
    let request = Request::Tokenize(request(sender));
    // A separate task: a caller that goes away must not drop the receiver.
    let work = tokio::spawn(async move {
        let _held = held;
        engine.send(request).await.map_err(engine_error)?;
        receiver.recv().await.ok_or_else(silent)
    });
    work.await
        .map_err(engine_error)??
        .map_err(|error| Error::Engine(error.root_cause().to_string()))
}
