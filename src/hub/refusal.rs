//! What the Hub means when it answers with an error, and what to do about it.

use std::fmt;

use hf_hub::api::sync::ApiError;

/// An answer of the Hub other than what was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// 401 or 403; the Hub says so of what does not exist, too.
    Access(u16),
    /// 404.
    Missing,
    /// Any other status.
    Status(u16),
}

impl Refusal {
    /// `None` if the Hub gave no answer.
    pub(super) fn of(error: &ApiError) -> Option<Self> {
        let error = match error {
            ApiError::RequestError(error) => error,
            ApiError::TooManyRetries(last) => return Self::of(last),
            _ => return None,
        };
        match **error {
            ureq::Error::Status(status @ (401 | 403), _) => Some(Self::Access(status)),
            ureq::Error::Status(404, _) => Some(Self::Missing),
            ureq::Error::Status(status, _) => Some(Self::Status(status)),
            ureq::Error::Transport(_) => None,
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Access(status) => write!(
                f,
                "the Hub refuses access ({status}), which it also does where nothing has that name; check the name, and for a private or gated repository accept its terms on its page and set HF_TOKEN to a token that may read it"
            ),
            Self::Missing => f.write_str(
                "the Hub has no such repository, revision or file (404); check the name and the revision",
            ),
            Self::Status(status) => write!(f, "the Hub answers with status {status}; try again later"),
        }
    }
}
