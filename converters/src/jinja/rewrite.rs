//! A template's text as minijinja reads it: what Jinja2 takes, and minijinja does not or otherwise.

use std::fmt::Write as _;

use super::code::{
    closing, code_length, ends_operand, last_of, operand_length, parts, tokens, words_outside,
};
use super::values;

/// Variables that hold what the ends of a generation block print.
pub(super) const BEGIN: &str = "generation_begins_here";
pub(super) const END: &str = "generation_ends_here";

/// Statements of minijinja that transformers does not have.
const UNKNOWN: [&str; 1] = ["do"];

/// - Line ends become LF, as in Jinja2.
/// - `x[a:b:c]` becomes a call: minijinja slices none, and negative steps otherwise than Python.
/// - `{% for x in y %}` refuses a `y` that is none.
/// - `{% generation %}`, which marks trained text for transformers, prints a mark at its ends.
///
/// # Errors
/// For a statement that transformers does not know.
pub(super) fn to_minijinja(source: &str) -> Result<String, String> {
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let mut out = String::with_capacity(source.len());
    let mut rest = source.as_str();
    while let Some(at) = rest.find('{') {
        let (data, block) = rest.split_at(at);
        out.push_str(data);
        let end = match block.get(..2) {
            Some("{#") => {
                let n = block.find("#}").map_or(block.len(), |at| at + 2);
                out.push_str(&block[..n]);
                rest = &block[n..];
                continue;
            }
            Some("{{") => "}}",
            Some("{%") => "%}",
            _ => {
                out.push('{');
                rest = &block[1..];
                continue;
            }
        };
        let n = code_length(&block[2..], end);
        let (code, after) = block[2..].split_at(n);
        let Some(after) = after.strip_prefix(end) else {
            out.push_str(block);
            return Ok(out);
        };
        if end == "%}" && statement(code).1 == "raw" {
            rest = write_raw(&mut out, code, after);
            continue;
        }
        if end == "}}" {
            let _ = write!(out, "{{{{{}}}}}", expression(code));
        } else {
            write_statement(&mut out, code)?;
        }
        rest = after;
    }
    out.push_str(rest);
    Ok(out)
}

/// Whether a template has a generation block.
pub(super) fn marks_generation(source: &str) -> bool {
    source
        .split("{%")
        .skip(1)
        .filter_map(|rest| rest.split_once("%}"))
        .any(|(code, _)| statement(code).1 == "generation")
}

/// The mark for white space at the begin of a statement, its name, what follows, and the mark at its end.
fn statement(code: &str) -> (&str, &str, &str, &str) {
    let (left, code) = match code.as_bytes().first() {
        Some(b'-' | b'+') => code.split_at(1),
        _ => ("", code),
    };
    let (code, right) = match code.as_bytes().last() {
        Some(b'-' | b'+') => code.split_at(code.len() - 1),
        _ => (code, ""),
    };
    let code = code.trim();
    let end = code
        .find(|c: char| !(c.is_alphanumeric() || c == '_'))
        .unwrap_or(code.len());
    (left, &code[..end], &code[end..], right)
}

fn write_statement(out: &mut String, code: &str) -> Result<(), String> {
    let (left, name, rest, right) = statement(code);
    let written = match name {
        "generation" => write!(
            out,
            "{{%{left} if true %}}{{{{ {BEGIN} }}}}{{% with {right}%}}"
        ),
        "endgeneration" => write!(
            out,
            "{{%{left} endwith %}}{{{{ {END} }}}}{{% endif {right}%}}"
        ),
        "for" => write!(
            out,
            "{{%{left} for{} {right}%}}",
            loop_over(&expression(rest))
        ),
        name if UNKNOWN.contains(&name) => {
            let line = out.matches('\n').count() + 1;
            return Err(format!(
                "unknown statement `{name}` (line {line} of the template)"
            ));
        }
        _ => write!(out, "{{%{}%}}", expression(code)),
    };
    written.map_err(|_| "it is too long".to_owned())
}

/// `x in y if z`, with `y` checked.
fn loop_over(code: &str) -> String {
    let tokens = tokens(code);
    let words = words_outside(&tokens);
    let Some(&(begin, _)) = words.iter().find(|(_, word)| *word == "in") else {
        return code.to_owned();
    };
    let end = words
        .iter()
        .find(|(idx, word)| *idx > begin && matches!(*word, "if" | "recursive"))
        .map_or(tokens.len(), |(idx, _)| *idx);
    let join = |tokens: &[&str]| tokens.concat();
    format!(
        "{} ({}|looped) {}",
        join(&tokens[..=begin]),
        join(&tokens[begin + 1..end]).trim(),
        join(&tokens[end..])
    )
}

/// `code` in calls where minijinja has no operator for it.
fn expression(code: &str) -> String {
    let tokens = tokens(code);
    calls(&tokens)
}

/// - Slices, and subscripts that may name a method.
/// - `'text' % values`.
/// - Sums with a part that `safe` or `escape` has marked: the others are escaped.
fn calls(tokens: &[&str]) -> String {
    let mut out = String::new();
    let mut begin = 0;
    let words = words_outside(tokens);
    let ends = words.iter().filter(|(_, word)| SEPARATORS.contains(word));
    for (end, word) in ends
        .map(|(idx, word)| (*idx, *word))
        .chain([(tokens.len(), "")])
    {
        out.push_str(&sum(&tokens[begin..end]));
        out.push_str(word);
        begin = end + 1;
    }
    out
}

/// What binds less than a sum.
const SEPARATORS: [&str; 14] = [
    ",", ":", "=", "<", ">", "!", "and", "else", "if", "in", "is", "not", "or", "set",
];

fn sum(tokens: &[&str]) -> String {
    let mut operands = Vec::new();
    let mut begin = 0;
    for (idx, word) in words_outside(tokens) {
        if word == "+" && ends_operand(last_of(&tokens[..idx])) {
            operands.push(&tokens[begin..idx]);
            begin = idx + 1;
        }
    }
    operands.push(&tokens[begin..]);
    let is_marked = |tokens: &&[&str]| {
        let words = words_outside(tokens);
        let words: Vec<&str> = words
            .iter()
            .map(|(_, word)| *word)
            .filter(|word| !word.trim().is_empty())
            .collect();
        let mut pairs = words.windows(2);
        pairs.any(|pair| pair[0] == "|" && MARKING.contains(&pair[1]))
    };
    if operands.len() == 1 || !operands.iter().any(is_marked) {
        return chain(tokens);
    }
    let operands: Vec<String> = operands.into_iter().map(chain).collect();
    format!("marked_sum({})", operands.join(", "))
}

/// Filters whose answer is marked as safe.
const MARKING: [&str; 4] = ["safe", "e", "escape", "forceescape"];

fn chain(tokens: &[&str]) -> String {
    let mut out = String::new();
    let mut before = "";
    let mut idx = 0;
    while idx < tokens.len() {
        let token = tokens[idx];
        if let "(" | "[" | "{" = token {
            let end = closing(tokens, idx);
            let inner = &tokens[idx + 1..end.min(tokens.len())];
            let close = tokens.get(end).copied().unwrap_or_default();
            let parts = parts(inner);
            let is_subscript = token == "[" && ends_operand(before);
            if is_subscript && parts.len() > 1 {
                let arguments: Vec<String> = parts
                    .iter()
                    .map(|part| match part.concat().trim() {
                        "" => "none".to_owned(),
                        _ => calls(part).trim().to_owned(),
                    })
                    .collect();
                let _ = write!(out, ".python_slice({})", arguments.join(", "));
            } else if is_subscript && is_method_name(inner) {
                let _ = write!(out, ".python_item({})", inner.concat());
            } else {
                let _ = write!(out, "{token}{}{close}", calls(inner));
            }
            before = ")";
            idx = end + 1;
            continue;
        }
        if token == "%" && before.starts_with(['\'', '"']) {
            let n = operand_length(&tokens[idx + 1..]);
            let operand = chain(&tokens[idx + 1..idx + 1 + n]);
            let _ = write!(out, ".python_percent({})", operand.trim());
            before = ")";
            idx += 1 + n;
            continue;
        }
        out.push_str(token);
        if !token.trim().is_empty() {
            before = token;
        }
        idx += 1;
    }
    out
}

/// Whether a subscript is the name of a method of dictionaries, in quotes.
fn is_method_name(tokens: &[&str]) -> bool {
    let code = tokens.concat();
    let code = code.trim();
    ['\'', '"'].iter().any(|quote| {
        let name = code.strip_prefix(*quote);
        let name = name.and_then(|rest| rest.strip_suffix(*quote));
        name.is_some_and(values::is_method)
    })
}

/// Writes a raw block as a text: minijinja takes a line end behind its begin away, Jinja2 does not. What follows the block is left.
fn write_raw<'a>(out: &mut String, code: &str, text: &'a str) -> &'a str {
    let mut at = 0;
    while let Some(found) = text[at..].find("{%") {
        let begin = at + found + 2;
        let Some(n) = text[begin..].find("%}") else {
            break;
        };
        let (left, name, _, right) = statement(&text[begin..begin + n]);
        if name == "endraw" {
            let mut raw = &text[..begin - 2];
            if statement(code).3 == "-" {
                raw = raw.trim_start();
            }
            let line = raw.rfind('\n').map_or(raw.len(), |at| at + 1);
            if left == "-" {
                raw = raw.trim_end();
            } else if left != "+" && raw[line..].trim().is_empty() {
                raw = &raw[..line];
            }
            let raw = raw.replace('\\', "\\\\").replace('"', "\\\"");
            let begin_left = statement(code).0;
            let _ = write!(
                out,
                "{{%{begin_left} if true %}}{{{{ \"{raw}\" }}}}{{% endif {right}%}}"
            );
            return &text[begin + n + 2..];
        }
        at = begin;
    }
    let _ = write!(out, "{{%{code}%}}");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pythons_habits_are_rewritten_and_nothing_else() {
        for (source, expected) in [
            (
                "{% for m in messages[::-1] %}",
                "{% for m in (messages.python_slice(none, none, -1)|looped)  %}",
            ),
            (
                "{{ a['items'] }}{{ ['items'] }}",
                "{{ a.python_item('items') }}{{ ['items'] }}",
            ),
            (
                "{{ m.content[1:][0] + [a[:-1], 'x:y'[b]] }}",
                "{{ m.content.python_slice(1, none)[0] + [a.python_slice(none, -1), 'x:y'[b]] }}",
            ),
            ("{{ {'a': [1]}['a'] }}", "{{ {'a': [1]}['a'] }}"),
            ("{{ '}}' }}a\r\nb\rc", "{{ '}}' }}a\nb\nc"),
            (
                "{# [1:] #}{% raw %}\n{{ \"a\"[1:] }}\n {%endraw -%}",
                "{# [1:] #}{% if true %}{{ \"\n{{ \\\"a\\\"[1:] }}\n\" }}{% endif -%}",
            ),
            (
                "{{ 'a'|safe + b|tojson + c[1:] if d else '%s' % (e, f) }}",
                "{{marked_sum( 'a'|safe ,  b|tojson ,  c.python_slice(1, none) )if d else '%s' .python_percent((e, f)) }}",
            ),
            (
                "{{ 'a' + b|upper }}{{ a | safe }}",
                "{{ 'a' + b|upper }}{{ a | safe }}",
            ),
            (
                "{%- for a in b if a[0:1] -%}",
                "{%- for a in (b|looped) if a.python_slice(0, 1) -%}",
            ),
            ("{% generation", "{% generation"),
            ("{{ add_generation_prompt }}", "{{ add_generation_prompt }}"),
            ("{% if x in [1, 2] %}{ }", "{% if x in [1, 2] %}{ }"),
        ] {
            assert_eq!(to_minijinja(source).as_deref(), Ok(expected), "{source}");
        }
        assert!(
            to_minijinja("a\n{% do x %}")
                .expect_err("unknown")
                .contains("line 2")
        );
    }

    #[test]
    fn a_generation_block_keeps_its_marks_for_white_space() {
        let text = to_minijinja("{%- generation -%} x {%+ endgeneration %}").expect("sound");
        assert!(
            text.starts_with("{%- if true %}") && text.contains("{% with -%} x {%+ endwith %}"),
            "{text}"
        );
        assert!(text.ends_with("{% endif %}"), "{text}");
        assert!(marks_generation("{%- generation -%}") && !marks_generation("{{ generation }}"));
    }
}
