//! Finds what a chat template does not print of a conversation, by rendering it with and without that part.

use monteclora_converters::Error;
use serde_json::{Map, Value};

use super::{
    error::field_problem,
    rows::{Message, Role},
    template::{Beside, ChatTemplate},
};

/// Names for the thoughts of the assistant before its answer; a template reads one of them.
const THOUGHTS: [&str; 4] = ["reasoning_content", "reasoning", "thinking", "thoughts"];

/// Names for the assistant's tool calls.
const CALLS: [&str; 2] = ["tool_calls", "function_call"];

/// Refuses a conversation if the template leaves out something that the row has: tools, documents, calls, thoughts, or
/// the text of a turn.
///
/// # Errors
/// Returns an error that names the fields, or the template's own error message.
pub(super) fn refuse_unprinted(
    template: &ChatTemplate,
    messages: &[Message],
    beside: Beside<'_>,
) -> Result<(), Error> {
    let mut fields: Vec<Map<String, Value>> = messages.iter().map(|m| template.fields(m)).collect();
    let rendered = template.render_fields(&fields, beside, opens(&fields));
    // A template may refuse null content because it cannot print what the row has instead. Then that field is the
    // better reason.
    let (text, refusal) = match rendered {
        Ok(rendered) => (rendered.text, None),
        Err(refusal) => {
            let is_null = |fields: &&mut Map<String, Value>| {
                fields.get("content").is_some_and(Value::is_null)
            };
            for fields in fields.iter_mut().filter(is_null) {
                fields.insert("content".to_owned(), "".into());
            }
            match template.render_fields(&fields, beside, opens(&fields)) {
                Ok(rendered) => (rendered.text, Some(refusal)),
                Err(_) => return Err(refusal),
            }
        }
    };
    let conversation = Whole {
        template,
        text,
        fields,
        beside,
    };
    let mut unprinted = Vec::new();
    if !beside.tools.is_empty() && !conversation.prints_tools() {
        unprinted.push("tools".to_owned());
    }
    if !conversation.prints_documents() {
        unprinted.push("documents".to_owned());
    }
    for (idx, message) in messages.iter().enumerate() {
        for keys in [&CALLS[..], &THOUGHTS[..]] {
            let there: Vec<&str> = (keys.iter().copied())
                .filter(|key| message.fields().get(*key).is_some_and(holds_something))
                .collect();
            let [first, ..] = there[..] else { continue };
            if !conversation.prints(idx, |fields| {
                there.iter().for_each(|key| drop(fields.shift_remove(*key)))
            }) {
                unprinted.push(format!("messages[{idx}].{first}"));
            }
        }
        if !conversation.prints_content(idx, message.content()) {
            unprinted.push(format!("messages[{idx}].content"));
        } else if message.role() == Role::Assistant
            && message.trained()
            && !conversation.prints_thought(idx, message.content())
        {
            unprinted.push(format!("messages[{idx}].content (its <think> part)"));
        }
    }
    if unprinted.is_empty() {
        return refusal.map_or(Ok(()), Err);
    }
    let it = if unprinted.len() == 1 { "it" } else { "them" };
    let problem =
        format!("the chat template does not print {it}, so the model would never see {it}");
    let fix = format!(
        "give a template that prints {it} with --chat-template, or remove {it} from the row"
    );
    Err(field_problem(unprinted.join(", "), problem, fix).into())
}

/// The first turn whose null content the template prints as the word None, as it does in transformers.
pub(super) fn printed_null(
    template: &ChatTemplate,
    messages: &[Message],
    beside: Beside<'_>,
) -> Option<usize> {
    let is_null = |message: &Message| message.fields().get("content").is_some_and(Value::is_null);
    let turns = (0..messages.len()).filter(|idx| is_null(&messages[*idx]));
    let turns: Vec<usize> = turns.collect();
    if turns.is_empty() {
        return None;
    }
    let fields: Vec<Map<String, Value>> = messages.iter().map(|m| template.fields(m)).collect();
    let whole = Whole {
        template,
        text: (template.render_fields(&fields, beside, opens(&fields)))
            .ok()?
            .text,
        fields,
        beside,
    };
    turns.into_iter().find(|idx| whole.prints_none(*idx))
}

/// Whether a generation prompt is due, because the last turn is not the assistant's. Templates may refuse to render
/// without it.
fn opens(messages: &[Map<String, Value>]) -> bool {
    let last = messages.last().and_then(|message| message.get("role"));
    last.is_some_and(|role| role != "assistant")
}

fn holds_something(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::String(text) => !text.trim().is_empty(),
        Value::Array(list) => !list.is_empty(),
        Value::Object(object) => !object.is_empty(),
        Value::Bool(_) | Value::Number(_) => true,
    }
}

struct Whole<'a> {
    template: &'a ChatTemplate,
    beside: Beside<'a>,
    fields: Vec<Map<String, Value>>,
    text: String,
}

impl Whole<'_> {
    fn render(&self, fields: &[Map<String, Value>]) -> Option<String> {
        let rendered = self
            .template
            .render_fields(fields, self.beside, opens(fields));
        rendered.ok().map(|rendered| rendered.text)
    }

    fn prints_documents(&self) -> bool {
        let mut variables = self.beside.variables.clone();
        if variables.shift_remove("documents").is_none() {
            return true;
        }
        let beside = Beside {
            variables: &variables,
            ..self.beside
        };
        let (fields, opens) = (&self.fields, opens(&self.fields));
        let without = self.template.render_fields(fields, beside, opens);
        without.map_or(true, |without| without.text != self.text)
    }

    fn prints_tools(&self) -> bool {
        let (fields, variables) = (&self.fields, self.beside.variables);
        let without = self
            .template
            .render_without_tools(fields, variables, opens(fields));
        without.map_or(true, |without| without.text != self.text)
    }

    /// Whether a change of a turn changes the text of the conversation up to this turn, or of the whole. Both are
    /// rendered, because templates may leave out the thoughts of earlier turns. If the template refuses the changed
    /// turn, it does read that part.
    fn prints(&self, idx: usize, change: impl Fn(&mut Map<String, Value>)) -> bool {
        let differs = |with: Option<String>, mut fields: Vec<Map<String, Value>>| {
            with.is_some_and(|with| {
                change(&mut fields[idx]);
                self.render(&fields).is_none_or(|without| without != with)
            })
        };
        let until = self.fields[..=idx].to_vec();
        let with = self.render(&until);
        (idx + 1 < self.fields.len() && differs(with, until))
            || differs(Some(self.text.clone()), self.fields.clone())
    }

    fn prints_content(&self, idx: usize, content: &str) -> bool {
        let content = content.trim();
        content.is_empty()
            || self.text.contains(content)
            || self.prints(idx, |fields| {
                // Not an empty text, which templates may refuse.
                fields.insert("content".to_owned(), "\u{25a1}".into());
            })
    }

    /// Whether the thoughts of an answer, from `<think>` to `</think>` in its content, are in the text up to this turn
    /// or in the whole. Some templates cut thoughts out of earlier answers, and some out of every answer.
    fn prints_thought(&self, idx: usize, content: &str) -> bool {
        let thought = content.split_once("</think>").map(|(before, _)| {
            before
                .rsplit_once("<think>")
                .map_or(before, |(_, inside)| inside)
                .trim()
        });
        let Some(thought) = thought.filter(|thought| !thought.is_empty()) else {
            return true;
        };
        let until = self.fields[..=idx].to_vec();
        self.text.contains(thought)
            || self
                .render(&until)
                .is_none_or(|text| text.contains(thought))
    }

    fn prints_none(&self, idx: usize) -> bool {
        let mut fields = self.fields.clone();
        fields[idx].insert("content".to_owned(), "".into());
        let n_printed = |text: &str| text.matches("None").count();
        let without = self.render(&fields);
        without.is_some_and(|without| n_printed(&without) < n_printed(&self.text))
    }
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;
    use crate::data::{
        RowContent,
        rows::parse_row,
        test_support::{model_with_template, tiny_llama},
    };

    /// Prints tools and calls, and the thoughts of the last answer only.
    const FULL: &str = "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n\
        {% if m.reasoning_content and loop.last %}[{{ m.reasoning_content }}]{% endif %}{{ m.content or '' }}\
        {% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}";

    fn refusal(template: Option<&str>, row: &str) -> Option<String> {
        let dir = template.map(|template| model_with_template(template, false));
        let path = dir
            .as_ref()
            .map_or_else(tiny_llama, |dir| dir.path().to_owned());
        let template = ChatTemplate::from_dir(&path, None, UNIX_EPOCH);
        let template = template.expect("loads").expect("has one");
        let (_, row) = parse_row(row.as_bytes(), None).expect("a good row");
        let RowContent::Conversation { messages, tools } = &row.content else {
            panic!("no conversation")
        };
        let beside = Beside {
            tools,
            variables: &row.variables,
        };
        let refused = refuse_unprinted(&template, messages, beside);
        refused.err().map(|error| error.to_string())
    }

    const TOOL: &str = r#"{"type":"function","function":{"name":"f","parameters":{}}}"#;

    fn with_call(content: &str) -> String {
        format!(
            r#"{{"messages":[{{"role":"user","content":"U"}},{{"role":"assistant","content":{content},"tool_calls":[{{"type":"function",
            "function":{{"name":"f","arguments":{{}}}}}}]}},{{"role":"tool","content":"R"}},{{"role":"assistant","content":"A"}}],"tools":[{TOOL}]}}"#
        )
    }

    #[test]
    fn parts_that_a_template_has_no_place_for_are_refused_by_name() {
        for content in ["\"\"", "null"] {
            let said = refusal(None, &with_call(content)).expect("refused");
            let right = "tools, messages[1].tool_calls: the chat template does not print them, so the model would never see them; give a template that prints them with --chat-template, or remove them from the row";
            assert_eq!(said, right);
            assert_eq!(refusal(Some(FULL), &with_call(content)), None);
            let adding = "{% for m in messages %}{{ m.role + m.content }}{% endfor %}";
            assert_eq!(
                refusal(Some(adding), &with_call(content)).as_deref(),
                Some(right)
            );
        }
        let adding = "{{ tools }}{% for m in messages %}{{ m.role + m.content }}{{ m.tool_calls }}{% endfor %}";
        let said = refusal(Some(adding), &with_call("null")).expect("refused");
        assert!(
            said.contains("the chat template refuses the conversation"),
            "{said}"
        );
        let thoughts = |role: &str| {
            format!(
                r#"{{"messages":[{{"role":"user","content":"U"}},{{"role":"assistant","content":"A","{role}":"T"}},
                {{"role":"user","content":"V"}},{{"role":"assistant","content":"B"}}]}}"#
            )
        };
        let said = refusal(None, &thoughts("reasoning_content")).expect("refused");
        assert!(
            said.starts_with("messages[1].reasoning_content: "),
            "{said}"
        );
        // The thoughts are printed if the answer is the last, as it is when it is trained.
        assert_eq!(refusal(Some(FULL), &thoughts("reasoning_content")), None);
        let said = refusal(Some(FULL), &thoughts("thinking")).expect("refused");
        assert!(said.starts_with("messages[1].thinking: "), "{said}");
        // Other keys, such as a name, need not be printed.
        assert_eq!(refusal(None, &thoughts("name")), None);
    }

    #[test]
    fn thoughts_cut_out_of_every_answer_and_texts_read_as_parts_are_refused() {
        let row = r#"{"messages":[{"role":"user","content":"U"},{"role":"assistant","content":"<think>\nlong\n</think>A"}]}"#;
        let cutting =
            "{% for m in messages %}{{ m.role }}{{ m.content.split('</think>')[-1] }}{% endfor %}";
        let said = refusal(Some(cutting), row).expect("refused");
        assert!(
            said.starts_with("messages[1].content (its <think> part): "),
            "{said}"
        );
        assert_eq!(refusal(None, row), None);
        // Thoughts are cut only out of earlier answers, which is intended.
        let earlier = "{% for m in messages %}{{ m.role }}{% if loop.last %}{{ m.content }}{% else %}{{ m.content.split('</think>')[-1] }}{% endif %}{% endfor %}";
        let two = r#"{"messages":[{"role":"user","content":"U"},{"role":"assistant","content":"<think>long</think>A"},
            {"role":"user","content":"V"},{"role":"assistant","content":"B"}]}"#;
        assert_eq!(refusal(Some(earlier), two), None);
        let parts = "{% for m in messages %}{{ m.role }}{% if m.content[0]['type'] == 'text' %}{{ m.content[0]['text'] }}{% endif %}{% endfor %}";
        let plain =
            r#"{"messages":[{"role":"user","content":"U"},{"role":"assistant","content":"A"}]}"#;
        let said = refusal(Some(parts), plain).expect("refused");
        assert!(said.starts_with("messages[0].content"), "{said}");
    }

    #[test]
    fn documents_that_a_template_passes_over_are_refused() {
        let row = r#"{"messages":[{"role":"user","content":"U"},{"role":"assistant","content":"A"}],"documents":[{"text":"D"}]}"#;
        let said = refusal(None, row).expect("refused");
        assert!(
            said.starts_with("documents: the chat template does not print it"),
            "{said}"
        );
        let printing = "{% for d in documents %}{{ d.text }}{% endfor %}{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}";
        assert_eq!(refusal(Some(printing), row), None);
    }

    #[test]
    fn turns_that_a_template_passes_over_are_refused() {
        let no_system = "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content | upper }}{% endfor %}";
        let row = r#"{"messages":[{"role":"system","content":"Be brief."},{"role":"user","content":"U"},{"role":"assistant","content":"a"}]}"#;
        let said = refusal(Some(no_system), row).expect("refused");
        assert!(
            said.starts_with("messages[0].content: the chat template does not print it"),
            "{said}"
        );
        assert_eq!(refusal(None, row), None);
        let row =
            r#"{"messages":[{"role":"user","content":"u"},{"role":"assistant","content":"<b>"}]}"#;
        assert_eq!(refusal(Some(no_system), row), None);
    }

    #[test]
    fn null_is_no_word_and_parts_are_one_text_where_a_template_takes_texts() {
        let printing = "{{ tools | tojson }}{% for m in messages %}{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}{% endfor %}";
        for (template, content, turn) in [
            (printing, "null", Some(1)),
            (printing, "\"None\"", None),
            (FULL, "null", None),
        ] {
            let dir = model_with_template(template, false);
            let template = ChatTemplate::from_dir(dir.path(), None, UNIX_EPOCH);
            let template = template.expect("loads").expect("has one");
            let (_, row) = parse_row(with_call(content).as_bytes(), None).expect("a good row");
            let RowContent::Conversation { messages, tools } = &row.content else {
                panic!("no conversation")
            };
            let variables = &row.variables;
            let found = printed_null(&template, messages, Beside { tools, variables });
            assert_eq!(found, turn, "{content}");
        }
        let parts = r#"{"messages":[{"role":"user","content":[{"type":"text","text":"one "},{"type":"text","text":"two"}]},{"role":"assistant","content":"A"}]}"#;
        let (_, row) = parse_row(parts.as_bytes(), None).expect("a good row");
        let RowContent::Conversation { messages, .. } = &row.content else {
            panic!("no conversation")
        };
        for (template, text) in [
            (
                "{% for m in messages %}{{ m.content }}|{% endfor %}",
                "one two|A|",
            ),
            (
                "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}<{{ p.text }}>{% endfor %}{% endif %}|{% endfor %}",
                "<one ><two>|A|",
            ),
        ] {
            let dir = model_with_template(template, false);
            let template = ChatTemplate::from_dir(dir.path(), None, UNIX_EPOCH);
            let template = template.expect("loads").expect("has one");
            assert_eq!(
                template.render(messages, &[], false).expect("renders"),
                text
            );
        }
    }
}
