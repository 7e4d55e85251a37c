//! The time, in the form that a template asks for.

use std::fmt::Write as _;
use std::time::{SystemTime, UNIX_EPOCH};

use chrono::{DateTime, Utc};

/// `time` in Coordinated Universal Time, in the form that `format` says as in Python's `strftime`.
///
/// # Errors
/// If `format` is none.
pub fn strftime(time: SystemTime, format: &str) -> Result<String, String> {
    let elapsed = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let seconds = i64::try_from(elapsed.as_secs()).unwrap_or_default();
    let time: DateTime<Utc> = DateTime::from_timestamp(seconds, 0).unwrap_or_default();
    let mut text = String::new();
    write!(text, "{}", time.format(format))
        .map_err(|_| format!("strftime_now: bad format `{format}`"))?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_date_in_a_bad_format_is_an_error() {
        assert_eq!(strftime(SystemTime::now(), "%Y").expect("a year").len(), 4);
        assert!(strftime(SystemTime::now(), "%Q").is_err());
    }
}
