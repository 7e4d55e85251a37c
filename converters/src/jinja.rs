//! Jinja as chat templates are written in it: Python's, which minijinja is told or spared.
//!
//! Training and serving both write conversations out with it, so that a model is served with the text it was trained on.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::{SystemTime, UNIX_EPOCH};

use chrono::{DateTime, Utc};
use minijinja::value::Kwargs;
use minijinja::{Environment, ErrorKind, Value as JinjaValue, filters};
use serde_json::Value;

/// Tool names that templates of Llama 3 and Harmony take for built in.
const BUILTIN_TOOLS: [&str; 6] = [
    "browser",
    "python",
    "code_interpreter",
    "web_search",
    "brave_search",
    "wolfram_alpha",
];

/// Most spaces that `tojson` indents by; Python has no limit, and memory has.
const MOST_INDENT: usize = 16;

/// What a chat template is compiled and rendered in; the template's own text has to be [rewritten](to_minijinja) first.
///
/// Blocks are trimmed as in transformers; Python's string methods, `raise_exception`, `strftime_now` and `tojson` exist. `tojson`
/// escapes `<`, `>`, `&` and `'`, as in mistral.rs (transformers does not). `now` is asked for the time of each `strftime_now`.
pub fn environment(now: impl Fn() -> SystemTime + Send + Sync + 'static) -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_lstrip_blocks(true);
    environment.set_trim_blocks(true);
    environment.add_filter("tojson", tojson);
    environment.add_function("raise_exception", |message: String| {
        Err::<String, _>(invalid(message))
    });
    environment.add_function("strftime_now", move |format: String| {
        strftime(now(), &format)
    });
    environment
}

/// Gives a template the variables that every conversation has: whether the model may think, and the tools, if there are any, under
/// the usual name, SmolLM3's, and that of Llama 3's and Harmony's own ones.
pub fn add_variables(context: &mut BTreeMap<&str, JinjaValue>, tools: &[Value]) {
    context.insert("enable_thinking", true.into());
    context.insert("reasoning_effort", "medium".into());
    if tools.is_empty() {
        return;
    }
    let names = tools
        .iter()
        .filter_map(|tool| tool["function"]["name"].as_str());
    let built_in: Vec<&str> = names.filter(|name| BUILTIN_TOOLS.contains(name)).collect();
    context.insert("tools", JinjaValue::from_serialize(tools));
    context.insert("xml_tools", JinjaValue::from_serialize(tools));
    context.insert("builtin_tools", JinjaValue::from_serialize(built_in));
}

/// The template's own words where it raised them, else the engine's; and the line of the template.
pub fn describe(error: &minijinja::Error) -> String {
    let detail = error
        .detail()
        .map_or_else(|| error.kind().to_string(), str::to_owned);
    match error.line() {
        Some(line) => format!("{detail} (line {line} of the template)"),
        None => detail,
    }
}

/// `time` in Coordinated Universal Time, in the form that `format` says as in Python's `strftime`.
///
/// # Errors
/// If `format` is none.
pub fn strftime(time: SystemTime, format: &str) -> Result<String, minijinja::Error> {
    let elapsed = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let seconds = i64::try_from(elapsed.as_secs()).unwrap_or_default();
    let time: DateTime<Utc> = DateTime::from_timestamp(seconds, 0).unwrap_or_default();
    let mut text = String::new();
    write!(text, "{}", time.format(format))
        .map_err(|_| invalid(format!("strftime_now: bad format `{format}`")))?;
    Ok(text)
}

fn invalid(message: String) -> minijinja::Error {
    minijinja::Error::new(ErrorKind::InvalidOperation, message)
}

/// Compact, or indented by `indent`; Python's other options are ignored, as by mistral.rs.
fn tojson(value: &JinjaValue, kwargs: Kwargs) -> Result<JinjaValue, minijinja::Error> {
    let indent = kwargs.get::<Option<usize>>("indent")?;
    let indent = indent.map(|indent| JinjaValue::from(indent.min(MOST_INDENT)));
    filters::tojson(
        value,
        indent,
        std::iter::empty::<(&str, JinjaValue)>().collect(),
    )
}

/// `source` as minijinja reads it:
///
/// - `[::-1]` becomes `|reverse`;
/// - `range(x, -1, -1)` becomes `range((x) + 1)|reverse`, as there are no negative steps;
/// - `{% generation %}`, which marks trained text for transformers and prints nothing, becomes a block that is always taken,
///   so that white space around it is handled as before.
pub fn to_minijinja(source: &str) -> String {
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
        assert_eq!(strftime(SystemTime::now(), "%Y").expect("a year").len(), 4);
        assert!(strftime(SystemTime::now(), "%Q").is_err());
    }
}
