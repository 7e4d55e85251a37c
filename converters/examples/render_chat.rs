//! Renders chat templates for `tests/reference/check_chat_templates.py`: JSON lines in, JSON lines out.
//!
//! In: `{"template": TEXT, "variables": {...}}`. Out: `{"text": ..., "generation": [[begin, end], ...]}` in characters, or `{"error": ...}`.

use std::io::{BufRead, Write};
use std::time::SystemTime;

use indexmap::IndexMap;
use monteclora_converters::jinja::{DEFAULT, Templates};
use serde_json::{Value, json};

fn main() -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    let mut compiled: Option<(String, Result<Templates, String>)> = None;
    for line in std::io::stdin().lock().lines() {
        let asked: Value = serde_json::from_str(&line?)?;
        let source = asked["template"].as_str().unwrap_or_default();
        if compiled.as_ref().is_none_or(|(last, _)| last != source) {
            let sources = IndexMap::from([(DEFAULT.to_owned(), source.to_owned())]);
            let templates = Templates::compile(sources, SystemTime::now);
            let templates = templates.map_err(|mut problems| problems.remove(0).1);
            compiled = Some((source.to_owned(), templates));
        }
        let variables = asked["variables"].as_object().cloned().unwrap_or_default();
        let rendered = match &compiled {
            Some((_, Ok(templates))) => templates.render(DEFAULT, &variables),
            Some((_, Err(reason))) => Err(reason.clone()),
            None => Err("no template".to_owned()),
        };
        let answer = match rendered {
            Ok(rendered) => {
                let n_chars = |end: usize| rendered.text[..end].chars().count();
                let ranges = rendered.generation.iter();
                let ranges: Vec<_> = ranges
                    .map(|range| [n_chars(range.start), n_chars(range.end)])
                    .collect();
                json!({"text": rendered.text, "generation": ranges})
            }
            Err(reason) => json!({"error": reason}),
        };
        writeln!(out, "{answer}")?;
    }
    Ok(())
}
