//! Data about the request that the current task answers.

use std::future::Future;
use std::sync::{Arc, OnceLock};

tokio::task_local! {
    static CURRENT: Arc<RequestContext>;
}

/// Maximum length of a request id that is accepted from a client.
const MAX_ID_LENGTH: usize = 128;

/// The id of one request, and the model that answers it once that is known.
#[derive(Debug)]
pub(crate) struct RequestContext {
    pub(crate) id: String,
    model: OnceLock<String>,
}

impl RequestContext {
    /// Uses the client's id if it is safe in a log, and makes a new one otherwise.
    pub(crate) fn new(given: Option<&str>) -> Self {
        let id = given
            .filter(|id| is_plain(id))
            .map_or_else(|| uuid::Uuid::new_v4().to_string(), str::to_owned);
        Self {
            id,
            model: OnceLock::new(),
        }
    }

    pub(crate) async fn scope<T>(self: Arc<Self>, work: impl Future<Output = T>) -> T {
        CURRENT.scope(self, work).await
    }

    /// The context of the current task; none in a task that a request has spawned.
    pub(crate) fn current() -> Option<Arc<Self>> {
        CURRENT.try_with(Arc::clone).ok()
    }

    /// Records the public name of the model that answers. Only the first name counts.
    pub(crate) fn set_model(name: &str) {
        if let Some(context) = Self::current() {
            context.model.get_or_init(|| name.to_owned());
        }
    }

    /// Public name of the model; empty if it is not known.
    pub(crate) fn model(&self) -> &str {
        self.model.get().map_or("", String::as_str)
    }
}

fn is_plain(id: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.:".contains(&byte);
    !id.is_empty() && id.len() <= MAX_ID_LENGTH && id.bytes().all(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clients_id_is_kept_if_it_is_plain() {
        assert_eq!(RequestContext::new(Some("req-1:a_b.c")).id, "req-1:a_b.c");
        let long = "x".repeat(MAX_ID_LENGTH + 1);
        for odd in ["", "a b", "a\nb", "é", long.as_str()] {
            assert_eq!(RequestContext::new(Some(odd)).id.len(), 36, "{odd:?}");
        }
        let (a, b) = (RequestContext::new(None), RequestContext::new(None));
        assert_ne!(a.id, b.id);
    }
}
