//! Admission of requests: limits the number of running and queued requests, and the time of each.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::App;
use super::api_error::ApiError;
use super::metrics::Counted;

/// The places of a request among the running and queued requests, one per choice.
pub(crate) struct Admission {
    pub(super) started: Instant,
    /// Time by which the whole answer must be finished.
    pub(super) deadline: Instant,
    places: Vec<Arc<OwnedSemaphorePermit>>,
    _in_flight: Counted,
}

impl Admission {
    /// Takes a place; fails if all places are taken or the server is stopping.
    pub(crate) fn new(app: &App) -> Result<Self, ApiError> {
        if app.draining.load(Ordering::SeqCst) {
            return Err(ApiError::unavailable("the server is stopping"));
        }
        let permit = Semaphore::try_acquire_owned(app.places.clone()).map_err(|_| too_many())?;
        let started = Instant::now();
        Ok(Self {
            started,
            deadline: started + Duration::from_secs(app.config.limits.request_timeout_s),
            places: vec![Arc::new(permit)],
            _in_flight: Counted::new(&app.metrics.requests_in_flight),
        })
    }

    /// Takes places for `n_choices` choices for each of `n_prompts` prompts, if enough places are free.
    pub(crate) fn widen(
        &mut self,
        app: &App,
        n_choices: usize,
        n_prompts: usize,
    ) -> Result<(), ApiError> {
        let most = app.config.limits.max_concurrent_requests;
        let n = n_choices * n_prompts;
        if n > most {
            let (key, asked) = match n_prompts {
                1 => ("n", format!("`n` is {n}")),
                _ => ("prompt", format!("the prompts ask for {n} answers")),
            };
            let message = format!("{asked}; this server works on at most {most} at a time");
            return Err(ApiError::invalid(key, message));
        }
        let more = u32::try_from(n.saturating_sub(1)).map_err(|_| too_many())?;
        let permit = Semaphore::try_acquire_many_owned(app.places.clone(), more);
        self.places.push(Arc::new(permit.map_err(|_| too_many())?));
        Ok(())
    }

    /// The permits of the places, for work that may outlive the request.
    pub(crate) fn places(&self) -> Vec<Arc<OwnedSemaphorePermit>> {
        self.places.clone()
    }

    /// Runs `work`; fails if it takes longer than a whole answer may take.
    pub(crate) async fn within<T>(
        &self,
        work: impl Future<Output = Result<T, ApiError>>,
    ) -> Result<T, ApiError> {
        tokio::time::timeout_at(self.deadline.into(), work)
            .await
            .unwrap_or_else(|_| Err(ApiError::timed_out()))
    }
}

fn too_many() -> ApiError {
    ApiError::unavailable("too many requests at a time; try again shortly")
}
