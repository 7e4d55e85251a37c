//! Who is let in: places among the requests that are worked on or queued, and the time each may take.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::App;
use super::api_error::ApiError;
use super::metrics::Counted;

/// A place among the requests that are worked on or queued, for each choice asked for.
pub(crate) struct Admission {
    pub(super) started: Instant,
    /// When the answer has to be whole.
    pub(super) deadline: Instant,
    places: Vec<Arc<OwnedSemaphorePermit>>,
    _in_flight: Counted,
}

impl Admission {
    /// A place, unless all are taken or the server is stopping.
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

    /// Takes places for `n_choices` for each of `n_prompts`, if there are any left.
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

    /// What keeps the places taken, for work that may go on after the request.
    pub(crate) fn places(&self) -> Vec<Arc<OwnedSemaphorePermit>> {
        self.places.clone()
    }

    /// `work`, unless it takes longer than a whole answer may.
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
