//! Expressions and statements with the answers that transformers 5.17 gives, as `tests/reference/check_chat_templates.py` records them.

use std::time::UNIX_EPOCH;

use indexmap::IndexMap;
use serde_json::{Map, Value, json};

use super::{DEFAULT, Rendered, Templates, find};

fn render(source: &str, variables: &Map<String, Value>) -> Result<Rendered, String> {
    let sources = IndexMap::from([(DEFAULT.to_owned(), source.to_owned())]);
    let templates = Templates::compile(sources, || UNIX_EPOCH);
    templates
        .map_err(|mut found| found.remove(0).1)?
        .render(DEFAULT, variables)
}

#[test]
fn answers_are_those_of_transformers() {
    let recorded = include_str!("../../../tests/data/chat_template_expressions.json");
    let recorded: Value = serde_json::from_str(recorded).expect("JSON");
    let variables = recorded["variables"].as_object().expect("an object");
    let answers = recorded["answers"].as_array().expect("a list");
    assert!(answers.len() > 300, "{} answers", answers.len());
    for answer in answers {
        let source = answer[0].as_str().expect("a text");
        let rendered = render(source, variables);
        let text = rendered
            .as_ref()
            .ok()
            .map(|rendered| rendered.text.as_str());
        assert_eq!(text, answer[1].as_str(), "{source}: {rendered:?}");
    }
}

#[test]
fn marked_ranges_are_those_between_the_markers() {
    let none = Map::new();
    for (source, text, marked) in [
        ("a{% generation %}b{% endgeneration %}c", "abc", vec!["b"]),
        (
            "{% for x in 'xy' %}{% generation %}{{ x }}é{% endgeneration %}\n-{% endfor %}",
            "xé-yé-",
            vec!["xé", "yé"],
        ),
        (
            "a {%- generation -%} b {%- endgeneration -%} c",
            "abc",
            vec!["b"],
        ),
        ("{% generation %}{% endgeneration %}", "", vec![""]),
    ] {
        let rendered = render(source, &none).expect("renders");
        assert_eq!(rendered.text, text, "{source}");
        let found: Vec<&str> = rendered
            .generation
            .iter()
            .map(|range| &text[range.clone()])
            .collect();
        assert_eq!(found, marked, "{source}");
    }
}

#[test]
fn what_transformers_refuses_is_refused_and_nothing_panics() {
    let variables = json!({"n": null, "t": "text"});
    let variables = variables.as_object().expect("an object");
    for source in [
        "{{ t[5:-100:-1] }}{{ n[1:] }}",
        "{{ range(100000000000) }}",
        "{{ t * 100000000000 }}",
        "{{ t.center(100000000000) }}",
        "{{ n | tojson(indent='x', nothing=1) }}",
        "{% macro m(x) %}{{ m(x) }}{% endmacro %}{{ m(1) }}",
        "{% do 1 %}",
        "{{ n.a.b }}",
        "{{ 'a' + n }}",
        "{{ [].append(1) }}",
        "{{ undefined | tojson }}",
        "{{ t | map('upper') | tojson }}",
        "{% for x in n %}{% endfor %}",
        "{{ 1 + ('a'|safe) }}",
        "{{ '%d' % 'x' }}",
        "{% generation %}",
        "{{ t[",
        "{% raw %}{{ x }}",
    ] {
        let refusal = render(source, variables).expect_err(source);
        assert!(!refusal.is_empty(), "{source}");
    }
}

#[test]
fn templates_are_found_in_the_order_of_transformers() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let write =
        |name: &str, text: &str| std::fs::write(dir.path().join(name), text).expect("written");
    let found = || {
        let found = find(dir.path(), None).expect("finds");
        found.map(|found| {
            let origin = found
                .origin
                .file_name()
                .expect("a name")
                .to_string_lossy()
                .into_owned();
            (origin, found.named.into_iter().collect::<Vec<_>>())
        })
    };
    let named = |name: &str, text: &str| (name.to_owned(), text.to_owned());
    assert_eq!(found(), None);
    write("chat_template.json", r#"{"chat_template": "old"}"#);
    let of = |origin: &str, named: Vec<(String, String)>| Some((origin.to_owned(), named));
    assert_eq!(
        found(),
        of("chat_template.json", vec![named("default", "old")])
    );
    let list = json!({"chat_template": [{"name": "default", "template": "d"}, {"name": "rag", "template": "r"}]});
    write("tokenizer_config.json", &list.to_string());
    let both = vec![named("default", "d"), named("rag", "r")];
    assert_eq!(found(), of("tokenizer_config.json", both));
    std::fs::create_dir(dir.path().join("additional_chat_templates")).expect("created");
    write("additional_chat_templates/tool_use.jinja", "t");
    write("additional_chat_templates/notes.txt", "no template");
    let with_default = vec![named("tool_use", "t"), named("default", "d")];
    assert_eq!(found(), of("tool_use.jinja", with_default));
    write("chat_template.jinja", "own");
    let own = vec![named("default", "own"), named("tool_use", "t")];
    assert_eq!(found(), of("chat_template.jinja", own));
    write("mine.json", "{}");
    let error = find(dir.path(), Some(&dir.path().join("mine.json"))).expect_err("no template");
    assert!(
        error.to_string().contains("has no key `chat_template`"),
        "{error}"
    );
}

#[test]
fn what_is_no_template_is_named_by_what_it_is() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("chat_template.jinja");
    for (text, said) in [
        (
            "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4103\n",
            "a Git LFS pointer",
        ),
        (
            "<!DOCTYPE html><html><body>404</body></html>",
            "an HTML page",
        ),
    ] {
        std::fs::write(&path, text).expect("written");
        for explicit in [None, Some(path.as_path())] {
            let error = find(dir.path(), explicit).expect_err(said).to_string();
            assert!(
                error.contains(said) && error.contains("chat_template.jinja"),
                "{error}"
            );
        }
    }
    std::fs::write(&path, "{{ messages }}").expect("written");
    assert!(find(dir.path(), None).expect("finds").is_some());
}
