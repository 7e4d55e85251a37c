//! Requests whose client has left: mistral.rs 0.8.1 takes a receiver that is gone for a failure, fails the whole batch over it and then
//! stops the engine. So a receiver stays until its answer has come, and an answer nobody waits for is made to end.

use mistralrs_core::{Request, TokenizationRequest};
use tokio::sync::mpsc::{Sender, channel};

use crate::engine::{engine_error, silent};
use crate::error::{Error, Result};

/// The tokens that an engine, which takes requests at `engine`, makes of `request`, which is given where to answer.
///
/// The engine may be at it longer than the caller waits; `held` is kept as long.
pub(crate) async fn tokenize(
    engine: Sender<Request>,
    request: impl FnOnce(Sender<anyhow::Result<Vec<u32>>>) -> TokenizationRequest,
    held: impl Send + 'static,
) -> Result<Vec<u32>> {
    let (sender, mut receiver) = channel(1);
    let request = Request::Tokenize(request(sender));
    // A task of its own: a caller that goes away must not take the receiver with it.
    let work = tokio::spawn(async move {
        let _held = held;
        engine.send(request).await.map_err(engine_error)?;
        receiver.recv().await.ok_or_else(silent)
    });
    work.await
        .map_err(engine_error)??
        .map_err(|error| Error::Engine(error.root_cause().to_string()))
}
