//! The text that mistral.rs 0.8.1 makes of conversations with its own template code, as an engine without this crate
//! would get it.

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use either::Either;
use indexmap::IndexMap;
use mistralrs_core::{MessageContent, Tool};
use parking_lot::Mutex;
use serde_json::{Map, Value};

use crate::chat_template::code;
use crate::error::Result;
use crate::loader::{MonteCloraLoader, panic_text};
use crate::quirks_0_8::conversations::Rendering;

/// A conversation after which the assistant's turn is opened.
#[derive(Debug, Clone, Default)]
pub struct AskedConversation {
    /// The messages, each with all its keys.
    pub messages: Vec<Map<String, Value>>,
    /// The available tools.
    pub tools: Vec<Value>,
}

/// The text that mistral.rs renders for each conversation, or why it renders none. It uses the template of the model in
/// `base`, or the one in `template`. It takes no variables.
///
/// # Errors
/// Returns an error if the model cannot be loaded.
pub fn own_texts(
    base: &Path,
    template: Option<&Path>,
    conversations: &[AskedConversation],
) -> Result<Vec<std::result::Result<String, String>>> {
    let mut loader = MonteCloraLoader::builder(base, "base")
        .chat_template(template.map(Path::to_owned))
        .build()?;
    loader.rendering = Rendering::AsFound;
    let pipeline = loader.load()?;
    let pipeline = pipeline.blocking_lock();
    let texts = conversations.iter().map(|asked| {
        let messages = asked.messages.iter().map(message).collect();
        let tools: Vec<Tool> = asked
            .tools
            .iter()
            .map(|tool| serde_json::from_value(tool.clone()))
            .collect::<std::result::Result<_, _>>()
            .map_err(|error| format!("mistral.rs does not take the tools: {error}"))?;
        let written = catch_unwind(AssertUnwindSafe(|| {
            let processor = pipeline.get_processor();
            processor.process(&*pipeline, messages, true, false, None, None, tools)
        }));
        match written {
            Ok(Ok((_, text))) => Ok(text),
            Ok(Err(error)) => Err(format!("{error:#}")),
            Err(panic) => Err(format!("it panics: {}", panic_text(panic.as_ref()))),
        }
    });
    Ok(texts.collect())
}

/// Converts a message to mistral.rs's type, which holds texts and lists of objects. Null becomes the empty text; other
/// values are dropped.
fn message(fields: &Map<String, Value>) -> IndexMap<String, MessageContent> {
    let held = |value: &Value| match value {
        Value::String(text) => Some(Either::Left(text.clone())),
        Value::Null => Some(Either::Left(String::new())),
        Value::Array(list) => {
            let objects = list.iter().map(|item| {
                let object = item.as_object()?.iter();
                Some(
                    object
                        .map(|(key, value)| (key.clone(), value.clone()))
                        .collect(),
                )
            });
            objects.collect::<Option<Vec<_>>>().map(Either::Right)
        }
        _ => None,
    };
    let fields = fields.iter();
    fields
        .filter_map(|(key, value)| Some((key.clone(), held(value)?)))
        .collect()
}

/// Differences between mistral.rs and transformers: a word of the template's code, and what mistral.rs does with it.
const DIFFERENCES: [(&str, &str); 8] = [
    (
        "tojson",
        "`tojson` is compact and escapes HTML, and as it is published it sorts keys",
    ),
    (
        "enable_thinking",
        "`enable_thinking` is true unless a request says otherwise",
    ),
    (
        "reasoning_effort",
        "`reasoning_effort` is \"medium\" unless a request says otherwise",
    ),
    ("date_string", "`date_string` is today's date"),
    ("xml_tools", "`xml_tools` are the tools"),
    ("builtin_tools", "`builtin_tools` is defined with tools"),
    ("break", "`break` is no statement as it is published"),
    ("continue", "`continue` is no statement as it is published"),
];

/// Describes what mistral.rs would render differently in a template.
pub fn own_differences(template: &str) -> Vec<&'static str> {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let words: BTreeSet<&str> = code(template)
        .flat_map(|code| code.split(|c| !is_word(c)))
        .collect();
    let found = DIFFERENCES.iter().filter(|(word, _)| words.contains(word));
    found.map(|(_, difference)| *difference).collect()
}

/// Logs a warning, once per base, if mistral.rs alone would render its template differently.
pub(crate) fn warn_once(base: &Path, template: &str) {
    static SAID: OnceLock<Mutex<BTreeSet<PathBuf>>> = OnceLock::new();
    let differences = own_differences(template);
    if differences.is_empty()
        || !SAID
            .get_or_init(Mutex::default)
            .lock()
            .insert(base.to_owned())
    {
        return;
    }
    tracing::warn!(
        "`{}`: conversations are written out here as in training; mistral.rs 0.8.1 alone would do it otherwise ({}); \
         `monteclora parity --chat -m BASE` shows where",
        base.display(),
        differences.join("; ")
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_those_of_the_code() {
        for (template, n) in [
            ("{{ messages | tojson }} enable_thinking", 1),
            ("{% if enable_thinking %}{{ date_string }}{% endif %}", 2),
            (
                "{% for m in messages %}{% continue %}{%- break -%}{% endfor %}",
                2,
            ),
            ("tojson {# tojson #}{{ m.content }}", 0),
        ] {
            assert_eq!(own_differences(template).len(), n, "{template}");
        }
    }
}
