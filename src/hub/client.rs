//! A client of the Hub: its token, the form of its names, and the meaning of its error responses.

use std::io::IsTerminal;

use hf_hub::api::sync::{ApiBuilder, ApiError};
use monteclora_converters::Problem;

/// A problem with the Hub, and its fix; exit code 2.
pub(super) fn problem(at: impl Into<String>, message: impl Into<String>, fix: &str) -> Problem {
    Problem::new("hub", at, message, fix).exit(2)
}

/// Whether a text is `ORG/NAME`.
pub fn is_hub_id(id: &str) -> bool {
    let part = |p: &str| {
        !p.is_empty()
            && !p.starts_with('.')
            && p.chars()
                .all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    matches!(id.split('/').collect::<Vec<_>>()[..], [org, name] if part(org) && part(name))
}

/// The meaning of an error response of the Hub, and the fix; `None` if the Hub did not respond.
pub(super) fn refusal(error: &ApiError) -> Option<String> {
    let error = match error {
        ApiError::RequestError(error) => error,
        ApiError::TooManyRetries(last) => return refusal(last),
        _ => return None,
    };
    match **error {
        // The Hub also responds so if the repository does not exist.
        ureq::Error::Status(status @ (401 | 403), _) => Some(format!(
            "the Hub refuses access ({status}), which it also does where nothing has that name; check the name, and for a private or gated repository accept its terms on its page and set HF_TOKEN to a token that may read it"
        )),
        ureq::Error::Status(404, _) => Some(
            "the Hub has no such repository, revision or file (404); check the name and the revision".to_owned(),
        ),
        ureq::Error::Status(status, _) => {
            Some(format!("the Hub answers with status {status}; try again later"))
        }
        ureq::Error::Transport(_) => None,
    }
}

/// A client of the Hub with the token that `token_source` names.
pub(super) fn builder(token_source: &str) -> Result<ApiBuilder, Problem> {
    let builder = ApiBuilder::from_env().with_progress(std::io::stderr().is_terminal());
    Ok(match token(token_source)? {
        Some(token) => builder.with_token(token),
        None => builder,
    })
}

/// The token that a source names; `Some(None)` means no token. `None` leaves the choice to the Hub client: for `cache`
/// without HF_TOKEN, the token of `huggingface-cli login`.
pub(super) fn token(source: &str) -> Result<Option<Option<String>>, Problem> {
    // The part after the colon may be a token.
    let (kind, value) = match source.split_once(':') {
        Some((kind, value)) => (kind, Some(value)),
        None => (source, None),
    };
    let refuse = |message: &str| problem(format!("--token-source {kind}"), message, "");
    Ok(match (kind, value) {
        ("" | "cache", None) => std::env::var("HF_TOKEN")
            .ok()
            .filter(|token| !token.is_empty())
            .map(Some),
        ("none", None) => Some(None),
        ("literal", Some(token)) => Some(Some(token.to_owned())),
        ("env", Some(name)) => {
            let token = std::env::var(name).map_err(|_| refuse("the variable is not set"))?;
            Some(Some(token))
        }
        ("path", Some(path)) => {
            let text = std::fs::read_to_string(path);
            let text = text.map_err(|_| refuse("the file cannot be read"))?;
            Some(Some(text.trim().to_owned()))
        }
        _ => {
            return Err(refuse(
                "expected literal:TOKEN, env:VARIABLE, path:FILE, cache or none",
            ));
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hub_ids_are_two_plain_parts() {
        assert!(is_hub_id("HuggingFaceTB/SmolLM2-135M-Instruct"));
        for id in [
            "model",
            "a/b/c",
            "/abs/path",
            "../up",
            "a/..",
            "a/",
            "a b/c",
        ] {
            assert!(!is_hub_id(id), "{id}");
        }
    }

    #[test]
    fn token_sources() {
        assert!(matches!(token("none"), Ok(Some(None))));
        assert!(matches!(token("literal:x"), Ok(Some(Some(t))) if t == "x"));
        let error = token("secret-by-mistake:abc")
            .expect_err("unknown kind")
            .to_string();
        assert!(!error.contains("abc"));
    }
}
