//! Log-probabilities: mistral.rs 0.8.1 reports base-10 logarithms of filtered probabilities, which is not what clients expect.

use serde_json::{Value, json};

use crate::server::api_error::ApiError;

/// Refuses to be asked for any.
pub(crate) fn refuse(logprobs: Option<&Value>, top: Option<&Value>) -> Result<(), ApiError> {
    let wanted = |value: Option<&Value>, none: Value| value.is_some_and(|value| *value != none);
    if wanted(logprobs, json!(false)) || wanted(top, json!(0)) {
        let message = "log-probabilities are not supported";
        return Err(ApiError::invalid("logprobs", message));
    }
    Ok(())
}
