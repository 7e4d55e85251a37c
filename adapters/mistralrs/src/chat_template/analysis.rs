//! Finds the variables that a template reads, and the message keys that it may read.

use std::collections::HashSet;

/// Names in one template.
#[derive(Debug)]
pub(super) struct Names {
    /// Variables that the template reads without setting them first.
    variables: HashSet<String>,
    /// Every word of the template's code, including words in string literals.
    words: HashSet<String>,
}

impl Names {
    pub(super) fn of(template: &minijinja::Template<'_, '_>) -> Self {
        let nested = template.undeclared_variables(true);
        let mut variables: HashSet<String> = nested
            .into_iter()
            .filter_map(|path| Some(path.split('.').next()?.to_owned()))
            .collect();
        let mut found = HashSet::new();
        for code in code(template.source()) {
            let words = words(code);
            // minijinja counts `{% set x = x or y %}` as setting `x` only, although it also reads `x`.
            if let ["set", target, rest @ ..] = &words[..]
                && rest.contains(target)
            {
                variables.insert((*target).to_owned());
            }
            found.extend(words.into_iter().map(str::to_owned));
        }
        Self {
            variables,
            words: found,
        }
    }

    pub(super) fn reads(&self, variable: &str) -> bool {
        self.variables.contains(variable)
    }

    pub(super) fn mentions(&self, key: &str) -> bool {
        self.words.contains(key)
    }
}

/// Iterates over the code between the braces of `source`.
pub(crate) fn code(source: &str) -> impl Iterator<Item = &str> {
    let mut rest = source;
    std::iter::from_fn(move || {
        loop {
            let begin = rest.find('{')?;
            let end = match rest[begin..].get(..2) {
                Some("{%") => "%}",
                Some("{{") => "}}",
                Some("{#") => {
                    rest = rest[begin..].split_once("#}").map_or("", |(_, rest)| rest);
                    continue;
                }
                _ => {
                    rest = &rest[begin + 1..];
                    continue;
                }
            };
            let code = &rest[begin + 2..];
            let (code, after) = code.split_once(end).unwrap_or((code, ""));
            rest = after;
            return Some(code);
        }
    })
}

fn words(code: &str) -> Vec<&str> {
    code.split(|c: char| !(c.is_alphanumeric() || c == '_'))
        .filter(|word| !word.is_empty())
        .collect()
}

#[cfg(test)]
mod tests {
    use minijinja::Environment;

    use super::*;

    fn names(source: &str) -> Names {
        let environment = Environment::new();
        let template = environment.template_from_str(source);
        Names::of(&template.expect("valid"))
    }

    #[test]
    fn variables_that_are_read_are_told_from_those_that_are_set() {
        let names = names(
            "{%- if not tools is defined %}{% set tools = none %}{% endif %}{% for m in messages %}{{ m.name }}{% endfor %}\
             {% set day = day | default('today') %}{% set x = 1 %}{{ x }} thinking {# {{ hidden }} #}{{ a.b['c'] }}",
        );
        for (name, is_read) in [
            ("tools", true),
            ("messages", true),
            ("day", true),
            ("a", true),
            ("m", false),
            ("x", false),
            ("thinking", false),
            ("hidden", false),
        ] {
            assert_eq!(names.reads(name), is_read, "{name}");
        }
        for (key, is_mentioned) in [
            ("name", true),
            ("c", true),
            ("thinking", false),
            ("hidden", false),
        ] {
            assert_eq!(names.mentions(key), is_mentioned, "{key}");
        }
    }

    #[test]
    fn code_ends_with_the_text() {
        for source in ["{", "{{", "{% x", "é{", "{# x", ""] {
            assert!(code(source).count() <= 1, "{source}");
        }
    }
}
