//! What templates take for granted of Python's Jinja and minijinja does otherwise.

use std::fmt::Write as _;
use std::time::{SystemTime, UNIX_EPOCH};

use chrono::DateTime;

use super::invalid;

/// `source` as minijinja reads it:
///
/// - `[::-1]` becomes `|reverse`;
/// - `range(x, -1, -1)` becomes `range((x) + 1)|reverse`, as there are no negative steps;
/// - `{% generation %}`, which marks trained text for transformers and prints nothing, becomes a block that is always taken,
///   so that white space around it is handled as before.
pub(super) fn to_minijinja(source: &str) -> String {
    let source = source.replace("[::-1]", "|reverse");
    generation_blocks(&descending_ranges(&source))
}

fn descending_ranges(source: &str) -> String {
    let mut text = String::with_capacity(source.len());
    let mut rest = source;
    while let Some((before, after)) = rest.split_once("range(") {
        text.push_str(before);
        match descending(after) {
            Some((from, after)) => {
                let _ = write!(text, "range(({from}) + 1)|reverse");
                rest = after;
            }
            None => {
                text.push_str("range(");
                rest = after;
            }
        }
    }
    text + rest
}

/// The start of a range of which the arguments stand at the beginning of `text`, and what comes after it, if it descends to 0.
fn descending(text: &str) -> Option<(&str, &str)> {
    let (from, rest) = text.split_once(',')?;
    let minus_one = |text: &'_ str| -> Option<usize> {
        let rest = text.trim_start().strip_prefix('-')?.trim_start();
        Some(text.len() - rest.strip_prefix('1')?.trim_start().len())
    };
    let rest = rest[minus_one(rest)?..].strip_prefix(',')?;
    let rest = rest[minus_one(rest)?..].strip_prefix(')')?;
    Some((from, rest))
}

fn generation_blocks(source: &str) -> String {
    let mut text = String::with_capacity(source.len());
    let mut rest = source;
    while let Some((before, after)) = rest.split_once("{%") {
        text.push_str(before);
        text.push_str("{%");
        rest = after;
        let Some((tag, after)) = after.split_once("%}") else {
            continue;
        };
        let is_control = |c: char| c == '-' || c == '+' || c.is_whitespace();
        let name = tag.trim_matches(is_control);
        let by = match name {
            "generation" => "if true",
            "endgeneration" => "endif",
            _ => continue,
        };
        text.push_str(&tag.replacen(name, by, 1));
        text.push_str("%}");
        rest = after;
    }
    text + rest
}

/// The present time in Coordinated Universal Time.
pub(super) fn strftime_now(format: String) -> Result<String, minijinja::Error> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let seconds = i64::try_from(now.unwrap_or_default().as_secs()).unwrap_or_default();
    let now = DateTime::from_timestamp(seconds, 0).unwrap_or_default();
    let mut text = String::new();
    write!(text, "{}", now.format(&format))
        .map_err(|_| invalid(format!("strftime_now: bad format `{format}`")))?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pythons_habits_are_rewritten_and_nothing_else() {
        for (source, expected) in [
            (
                "{% for m in messages[::-1] %}",
                "{% for m in messages|reverse %}",
            ),
            (
                "{% for i in range(messages|length - 1, -1, -1) %}",
                "{% for i in range((messages|length - 1) + 1)|reverse %}",
            ),
            (
                "{{ range( 3 , - 1 , -1 ) }}",
                "{{ range(( 3 ) + 1)|reverse }}",
            ),
            (
                "{{ range(3) }}{{ range(1, 3) }}",
                "{{ range(3) }}{{ range(1, 3) }}",
            ),
            ("{{ range(3, 0, -1) }}", "{{ range(3, 0, -1) }}"),
            (
                "{%- generation -%} x {%+ endgeneration %}",
                "{%- if true -%} x {%+ endif %}",
            ),
            ("{% generation", "{% generation"),
            ("{{ add_generation_prompt }}", "{{ add_generation_prompt }}"),
        ] {
            assert_eq!(to_minijinja(source), expected);
        }
    }

    #[test]
    fn a_date_in_a_bad_format_is_an_error() {
        assert_eq!(strftime_now("%Y".to_owned()).expect("a year").len(), 4);
        assert!(strftime_now("%Q".to_owned()).is_err());
    }
}
