//! Thread-locals: mistral.rs 0.8.1 keeps the quantisation and the adapters of a load in thread-locals that it never
//! clears.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread;

/// Runs `load` on a new thread, where these thread-locals are empty. The inner error is a panic of `load`.
pub(crate) fn on_fresh_thread<T: Send + 'static>(
    load: impl FnOnce() -> T + Send + 'static,
) -> std::io::Result<thread::Result<T>> {
    let thread = thread::Builder::new()
        .name("mistralrs-load".to_owned())
        .spawn(move || catch_unwind(AssertUnwindSafe(load)))?;
    Ok(thread.join().unwrap_or_else(Err))
}
