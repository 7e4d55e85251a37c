//! Constraints on the form of an answer: `grammar`, and vLLM's `structured_outputs` with its former names.

use mistralrs_core::Constraint;
use serde::Deserialize;
use serde_json::{Value, json};

use super::api_error::ApiError;
use crate::field_names::suggestion;

/// Keys that constrain the form of an answer; a request may have one of them.
#[derive(Default, Deserialize)]
#[serde(default)]
pub(crate) struct FormKeys {
    grammar: Option<Value>,
    structured_outputs: Option<Value>,
    guided_json: Option<Value>,
    guided_regex: Option<Value>,
    guided_choice: Option<Value>,
    guided_grammar: Option<Value>,
}

/// A constraint, and the key that requests it.
#[derive(Clone)]
pub(crate) struct Form {
    pub(crate) key: String,
    pub(crate) constraint: Constraint,
}

impl Form {
    pub(crate) fn new(key: impl Into<String>, constraint: Constraint) -> Self {
        Self {
            key: key.into(),
            constraint,
        }
    }
}

/// The error for two constraints that exclude each other.
pub(crate) fn exclusive(first: &str, second: &str) -> ApiError {
    let message = format!("`{first}` and `{second}` exclude each other; give one of them");
    ApiError::invalid(second, message)
}

impl FormKeys {
    /// The requested constraint.
    pub(crate) fn form(self) -> Result<Option<Form>, ApiError> {
        let mut forms = Vec::new();
        if let Some(grammar) = self.grammar {
            forms.push(of_grammar(&grammar)?);
        }
        if let Some(outputs) = &self.structured_outputs {
            forms.extend(of_structured_outputs(outputs)?);
        }
        for (key, kind, value) in [
            ("guided_json", "json", self.guided_json),
            ("guided_regex", "regex", self.guided_regex),
            ("guided_choice", "choice", self.guided_choice),
            ("guided_grammar", "grammar", self.guided_grammar),
        ] {
            if let Some(value) = value {
                forms.push(Form::new(key, constraint(key, kind, &value)?));
            }
        }
        if let [first, second, ..] = &forms[..] {
            return Err(exclusive(&first.key, &second.key));
        }
        Ok(forms.pop())
    }
}

fn wrong(key: &str, must: &str) -> ApiError {
    ApiError::invalid(key, format!("`{key}` must be {must}"))
}

fn text(key: &str, value: &Value) -> Result<String, ApiError> {
    let text = value.as_str().filter(|text| !text.is_empty());
    Ok(text.ok_or_else(|| wrong(key, "a text"))?.to_owned())
}

/// Reads a constraint in mistral.rs's format: `{"type": "regex", "value": "a+"}`.
fn of_grammar(grammar: &Value) -> Result<Form, ApiError> {
    const TYPES: &[&str] = &["regex", "lark", "json_schema", "llguidance"];
    let must = "an object with `type` (regex, lark, json_schema or llguidance) and `value`";
    let fields = grammar.as_object().ok_or_else(|| wrong("grammar", must))?;
    if let Some(key) = fields.keys().find(|key| *key != "type" && *key != "value") {
        let key = format!("grammar.{key}");
        return Err(ApiError::invalid(&key, format!("`{key}` is not supported")));
    }
    let value = fields.get("value").ok_or_else(|| wrong("grammar", must))?;
    let key = "grammar.value";
    let constraint = match fields.get("type").and_then(Value::as_str) {
        Some("regex") => Constraint::Regex(text(key, value)?),
        Some("lark") => Constraint::Lark(text(key, value)?),
        Some("json_schema") => Constraint::JsonSchema(schema(key, value)?),
        Some("llguidance") => {
            let grammar = serde_json::from_value(value.clone());
            Constraint::Llguidance(grammar.map_err(|error| {
                ApiError::invalid(key, format!("`{key}` is no llguidance grammar: {error}"))
            })?)
        }
        _ => {
            let types = TYPES.join(", ");
            return Err(wrong("grammar.type", &format!("one of {types}")));
        }
    };
    Ok(Form::new("grammar", constraint))
}

fn of_structured_outputs(outputs: &Value) -> Result<Option<Form>, ApiError> {
    const KINDS: &[&str] = &["json", "regex", "choice", "grammar", "json_object"];
    let at = "structured_outputs";
    let must = "an object with one of json, regex, choice, grammar, json_object";
    let fields = outputs.as_object().ok_or_else(|| wrong(at, must))?;
    let mut forms = Vec::new();
    for (kind, value) in fields.iter().filter(|(_, value)| !value.is_null()) {
        let key = format!("{at}.{kind}");
        if !KINDS.contains(&kind.as_str()) {
            let hint = suggestion(kind, KINDS, 0.85);
            let message = format!("`{key}` is not supported{hint}");
            return Err(ApiError::invalid(&key, message));
        }
        if kind == "json_object" && value == false {
            continue;
        }
        forms.push(Form::new(&*key, constraint(&key, kind, value)?));
    }
    if let [first, second, ..] = &forms[..] {
        return Err(exclusive(&first.key, &second.key));
    }
    Ok(forms.pop())
}

fn constraint(key: &str, kind: &str, value: &Value) -> Result<Constraint, ApiError> {
    Ok(match kind {
        "json" => Constraint::JsonSchema(schema(key, value)?),
        "json_object" => match value {
            Value::Bool(true) => Constraint::JsonSchema(json!({"type": "object"})),
            _ => return Err(wrong(key, "true or false")),
        },
        "regex" => Constraint::Regex(text(key, value)?),
        "grammar" => Constraint::Lark(text(key, value)?),
        _ => Constraint::Regex(choice(key, value)?),
    })
}

/// Reads a schema, given as an object or as its text.
fn schema(key: &str, value: &Value) -> Result<Value, ApiError> {
    let must = "a JSON schema, as an object or as its text";
    let schema = match value {
        Value::String(text) => serde_json::from_str(text).map_err(|_| wrong(key, must))?,
        value => value.clone(),
    };
    match schema {
        Value::Object(_) | Value::Bool(true) => Ok(schema),
        _ => Err(wrong(key, must)),
    }
}

/// The regular expression that matches any one of several texts.
fn choice(key: &str, value: &Value) -> Result<String, ApiError> {
    let must = "a list of texts, none of them empty";
    let texts = value.as_array().filter(|texts| !texts.is_empty());
    let texts = texts.ok_or_else(|| wrong(key, must))?.iter().map(|text| {
        let text = text.as_str().filter(|text| !text.is_empty());
        Ok(literal(text.ok_or_else(|| wrong(key, must))?))
    });
    Ok(texts.collect::<Result<Vec<_>, ApiError>>()?.join("|"))
}

/// The regular expression that matches `text` literally.
fn literal(text: &str) -> String {
    let mut expression = String::with_capacity(text.len());
    for c in text.chars() {
        // A backslash before other characters has a special meaning: `\<` is the beginning of a word.
        if r"\.+*?()|[]{}^$#&-~".contains(c) {
            expression.push('\\');
        }
        expression.push(c);
    }
    expression
}

#[cfg(test)]
mod tests {
    use super::*;

    fn form(body: Value) -> Result<Option<Form>, ApiError> {
        FormKeys::deserialize(body).expect("any values").form()
    }

    #[test]
    fn vllms_names_and_mistralrs_mean_the_same() {
        let shown = |body: Value| {
            let form = form(body).expect("sound").expect("a form");
            let constraint = match form.constraint {
                Constraint::Regex(regex) => format!("regex {regex}"),
                Constraint::Lark(lark) => format!("lark {lark}"),
                Constraint::JsonSchema(schema) => format!("schema {schema}"),
                _ => panic!("another constraint"),
            };
            (form.key, constraint)
        };
        let same = |bodies: [Value; 3]| {
            let found = bodies.map(|body| shown(body).1);
            assert!(found.iter().all(|form| *form == found[0]), "{found:?}");
        };
        let schema = json!({"type": "object"});
        same([
            json!({"structured_outputs": {"json": schema}}),
            json!({"guided_json": schema.to_string()}),
            json!({"grammar": {"type": "json_schema", "value": schema}}),
        ]);
        same([
            json!({"structured_outputs": {"regex": "a+"}}),
            json!({"guided_regex": "a+"}),
            json!({"grammar": {"type": "regex", "value": "a+"}}),
        ]);
        same([
            json!({"structured_outputs": {"choice": ["a.b", "c"]}}),
            json!({"guided_choice": ["a.b", "c"]}),
            json!({"grammar": {"type": "regex", "value": "a\\.b|c"}}),
        ]);
        same([
            json!({"structured_outputs": {"grammar": "start: \"a\"", "json": null}}),
            json!({"guided_grammar": "start: \"a\""}),
            json!({"grammar": {"type": "lark", "value": "start: \"a\""}}),
        ]);
        let (key, _) = shown(json!({"structured_outputs": {"json_object": true}}));
        assert_eq!(key, "structured_outputs.json_object");
        assert!(form(json!({})).expect("nothing asked").is_none());
    }

    #[test]
    fn a_choice_is_any_text() {
        let vocabulary = crate::server::vocabulary::tests::two_ends(&[1]);
        let printable: String = ('!'..='~').collect();
        for text in [">5", "a->b", "<|x|>", "a/b", &printable] {
            let form = form(json!({"guided_choice": [text, "x"]})).expect("sound");
            let compiled = vocabulary.compile(&form.expect("a form").constraint);
            let mut matcher = compiled.expect("compiles").expect("a grammar");
            let tokens = crate::server::vocabulary::tests::ids(&vocabulary, text);
            matcher.consume_tokens(&tokens).expect("fits");
            assert!(matcher.is_accepting().expect("sound"), "{text}");
        }
    }

    #[test]
    fn what_is_wrong_is_named_by_its_key() {
        for (body, key) in [
            (json!({"grammar": "root ::= a"}), "grammar"),
            (
                json!({"grammar": {"type": "gbnf", "value": "x"}}),
                "grammar.type",
            ),
            (json!({"grammar": {"type": "regex"}}), "grammar"),
            (
                json!({"grammar": {"type": "regex", "value": 3}}),
                "grammar.value",
            ),
            (
                json!({"grammar": {"type": "regex", "value": "a", "x": 1}}),
                "grammar.x",
            ),
            (
                json!({"grammar": {"type": "llguidance", "value": 3}}),
                "grammar.value",
            ),
            (json!({"guided_json": 3}), "guided_json"),
            (json!({"guided_json": "{"}), "guided_json"),
            (json!({"guided_choice": []}), "guided_choice"),
            (json!({"guided_choice": ["a", 3]}), "guided_choice"),
            (json!({"structured_outputs": []}), "structured_outputs"),
            (
                json!({"structured_outputs": {"jsn": {}}}),
                "structured_outputs.jsn",
            ),
            (
                json!({"structured_outputs": {"json": {}, "regex": "a"}}),
                "structured_outputs.regex",
            ),
            (
                json!({"guided_regex": "a", "guided_choice": ["b"]}),
                "guided_choice",
            ),
            (
                json!({"grammar": {"type": "regex", "value": "a"}, "guided_regex": "a"}),
                "guided_regex",
            ),
        ] {
            let error = form(body.clone())
                .err()
                .unwrap_or_else(|| panic!("{body} passed"));
            assert_eq!(error.body()["error"]["param"], key, "{body}");
        }
    }
}
