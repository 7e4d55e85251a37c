//! The documentation is what the program does: the configuration reference is generated from the code, the tutorial runs.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use monteclora::config::RunConfig;
use serde_json::Value;

use crate::cli::tiny;

/// Where keys, their types and their descriptions are defined.
const SOURCES: [&str; 2] = [
    include_str!("../../src/config/run.rs"),
    include_str!("../../src/data/example.rs"),
];
/// Sections of run.toml with the structures that hold them.
const SECTIONS: [(&str, &str); 6] = [
    ("model", "ModelConfig"),
    ("data", "DataConfig"),
    ("lora", "LoraConfig"),
    ("lora.monteclora", "MonteCloraConfig"),
    ("train", "TrainConfig"),
    ("eval", "EvalConfig"),
];

fn docs() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/docs"))
}

/// A field of a structure or a variant of an enumeration.
struct Item {
    name: String,
    kind: String,
    text: String,
}

/// The fields (`pub name: Type,`) or variants (`Name,`, `Name(Type),`) of `name`, with their documentation and serde names.
fn items(name: &str) -> Vec<Item> {
    let (source, start) = SOURCES
        .iter()
        .find_map(|source| {
            ["struct", "enum"].iter().find_map(|kind| {
                let head = format!("pub {kind} {name} {{\n");
                Some((source, source.find(&head)? + head.len()))
            })
        })
        .unwrap_or_else(|| panic!("{name} is not defined"));
    let before = &source[..start];
    let attributes = before.rsplit("\n\n").next().unwrap();
    let snake = |name: &str, separator: char| {
        let mut text = String::new();
        for letter in name.chars() {
            if letter.is_uppercase() && !text.is_empty() {
                text.push(separator);
            }
            text.extend(letter.to_lowercase());
        }
        text
    };
    let renamed = |variant: &str| match attributes.split("rename_all = \"").nth(1) {
        Some(rule) if rule.starts_with("lowercase") => variant.to_lowercase(),
        Some(rule) if rule.starts_with("kebab") => snake(variant, '-'),
        _ => snake(variant, '_'),
    };
    let (mut found, mut text, mut given) = (Vec::new(), String::new(), None);
    let mut skipped = false;
    for line in source[start..].lines().map(str::trim) {
        if line == "}" {
            break;
        } else if let Some(more) = line.strip_prefix("///") {
            if !text.is_empty() {
                text.push(' ');
            }
            text.push_str(more.trim());
        } else if line == "#[serde(skip)]" {
            // Not a key: what the code notes beside the keys.
            skipped = true;
        } else if line.starts_with("#[") {
            given = line
                .split("rename = \"")
                .nth(1)
                .and_then(|rest| rest.split('"').next())
                .map(str::to_owned)
                .or(given);
        } else if std::mem::take(&mut skipped) {
            text.clear();
        } else if let Some(line) = line.strip_suffix(',') {
            let (name, kind) = match line.strip_prefix("pub ") {
                Some(field) => {
                    let (name, kind) = field.split_once(": ").unwrap();
                    (name.to_owned(), kind.to_owned())
                }
                None => match line.split_once('(') {
                    Some((variant, kind)) => {
                        (renamed(variant), kind.trim_end_matches(')').to_owned())
                    }
                    None => (renamed(line), String::new()),
                },
            };
            found.push(Item {
                name: given.take().unwrap_or(name),
                kind,
                text: std::mem::take(&mut text),
            });
        }
    }
    assert!(!found.is_empty(), "{name} has no fields");
    found
}

/// A Rust type in a reader's words; an enumeration is named by its values.
fn words(kind: &str) -> String {
    let inner = |prefix: &str| {
        kind.strip_prefix(prefix)
            .and_then(|rest| rest.strip_suffix('>'))
    };
    if let Some(kind) = inner("Option<") {
        return words(kind);
    }
    if let Some(kind) = inner("Vec<") {
        return format!("list of {}", words(kind));
    }
    if let Some(kind) = inner("IndexMap<String, ") {
        return format!("table of {}", words(kind));
    }
    match kind {
        "usize" | "u64" => "whole number".to_owned(),
        "f64" => "number".to_owned(),
        "bool" => "true or false".to_owned(),
        "PathBuf" => "path".to_owned(),
        "String" => "text".to_owned(),
        "FieldNames" => "table of text".to_owned(),
        "ModuleSelection" => "`\"all-linear\"`, list of names, or regular expression".to_owned(),
        kind => items(kind)
            .iter()
            .map(|item| format!("`\"{}\"`", item.name))
            .collect::<Vec<_>>()
            .join(", "),
    }
}

fn is_enumeration(kind: &str) -> bool {
    kind != "ModuleSelection"
        && SOURCES
            .iter()
            .any(|source| source.contains(&format!("pub enum {kind} {{")))
}

/// Rustdoc's links as plain code, and a table's separator kept apart.
fn plain(text: &str) -> String {
    text.replace("[`", "`")
        .replace("`]", "`")
        .replace('|', "\\|")
}

fn reference() -> String {
    let minimal = "[model]\nmodel_id = \"m\"\n[data]\ntrain = \"t\"\nvalid = \"v\"\n[train]\noutput_dir = \"o\"\n";
    let resolved = RunConfig::from_toml(minimal, "run.toml", &[]).unwrap();
    let defaults = serde_json::to_value(resolved).unwrap();
    let mut page = String::from(
        "# Configuration reference: run.toml\n\n\
         Generated from the code; do not edit. `UPDATE_DOCS=1 cargo test --release --workspace configuration_reference` writes it anew.\n\n\
         An unknown key is an error that names the nearest known one. Every key can be given on the command line as `--set section.key=value`, which wins over the\n\
         file; the file wins over the defaults. Relative paths are relative to the current directory. `monteclora init` writes a file to begin with. For serve.toml see\n\
         [serve](serve.md).\n",
    );
    let default = |section: &str, key: &str| -> String {
        if [
            ("model", "model_id"),
            ("data", "train"),
            ("train", "output_dir"),
        ]
        .contains(&(section, key))
        {
            return "required".to_owned();
        }
        if (section, key) == ("data", "valid") {
            return "none".to_owned();
        }
        let value = section
            .split('.')
            .filter(|part| !part.is_empty())
            .fold(&defaults, |value, part| &value[part]);
        match &value[key] {
            Value::Null => "none".to_owned(),
            Value::Array(list) if list.is_empty() => "none".to_owned(),
            Value::Object(table) if table.is_empty() => "none".to_owned(),
            Value::Number(number) if number.is_f64() => {
                let value = number.as_f64().unwrap();
                if value != 0.0 && value < 1e-2 {
                    format!("`{value:e}`")
                } else {
                    format!("`{value}`")
                }
            }
            value => format!("`{value}`"),
        }
    };
    let mut sections = vec![("", "RunConfig")];
    sections.extend(SECTIONS);
    for (section, structure) in sections {
        match section {
            "" => page.push_str("\n## Before the first section\n"),
            name => write!(page, "\n## [{name}]\n").unwrap(),
        }
        page.push_str("\n| key | value | default | meaning |\n|---|---|---|---|\n");
        let mut enumerations: BTreeMap<String, String> = BTreeMap::new();
        let mut keys = Vec::new();
        for item in items(structure) {
            match item.kind.as_str() {
                // The sections themselves.
                kind if SECTIONS.iter().any(|(_, s)| kind.contains(s)) => {}
                // Two keys, one of which is given.
                "Length" => keys.extend(items("Length")),
                _ => keys.push(item),
            }
        }
        for item in keys {
            let Item { name, kind, text } = item;
            writeln!(
                page,
                "| `{name}` | {} | {} | {} |",
                words(&kind),
                default(section, &name),
                plain(&text)
            )
            .unwrap();
            let bare = kind
                .trim_start_matches("Option<")
                .trim_start_matches("Vec<")
                .trim_end_matches('>');
            if is_enumeration(bare) {
                enumerations.insert(name, bare.to_owned());
            }
        }
        for (key, kind) in enumerations {
            write!(page, "\n`{key}`:\n\n").unwrap();
            for item in items(&kind) {
                writeln!(page, "- `\"{}\"`: {}", item.name, plain(&item.text)).unwrap();
            }
        }
    }
    page
}

#[test]
fn the_configuration_reference_is_that_of_the_code() {
    let path = docs().join("configuration.md");
    let expected = reference();
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(&path, &expected).unwrap();
    }
    let found = std::fs::read_to_string(&path).unwrap_or_default();
    if let Some((a, b)) = found.lines().zip(expected.lines()).find(|(a, b)| a != b) {
        panic!(
            "docs/configuration.md is out of date; run with UPDATE_DOCS=1\n  file: {a}\n  code: {b}"
        );
    }
    assert_eq!(
        found.len(),
        expected.len(),
        "docs/configuration.md is out of date; run with UPDATE_DOCS=1"
    );
    for key in [
        "learning_rate",
        "kl_loss_weight",
        "max_steps",
        "num_train_epochs",
        "target_modules",
    ] {
        assert!(expected.contains(&format!("| `{key}` |")), "{key}");
    }
}

/// The commands of the console blocks: what follows `$ `, with the lines of a here-document.
fn commands(text: &str) -> Vec<String> {
    let mut commands: Vec<String> = Vec::new();
    let (mut inside, mut here) = (false, false);
    for line in text.lines() {
        if line.starts_with("```") {
            inside = line == "```console";
        } else if inside && here {
            let command = commands.last_mut().unwrap();
            write!(command, "\n{line}").unwrap();
            here = line != "EOF";
        } else if let Some(command) = line.strip_prefix("$ ").filter(|_| inside) {
            commands.push(command.to_owned());
            here = command.ends_with("<<'EOF'");
        }
    }
    commands
}

/// README.md and the pages of docs/.
fn pages() -> Vec<PathBuf> {
    let mut pages: Vec<PathBuf> = std::fs::read_dir(docs())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "md"))
        .collect();
    pages.push(docs().join("../README.md"));
    pages
}

/// A page without its blocks of code.
fn prose(text: &str) -> String {
    let mut inside = false;
    text.lines()
        .filter(|line| {
            inside ^= line.trim_start().starts_with("```");
            !inside
        })
        .map(|line| format!("{line}\n"))
        .collect()
}

/// The anchors of a page's headings, as GitHub makes them.
fn anchors(text: &str) -> Vec<String> {
    prose(text)
        .lines()
        .filter(|line| line.starts_with('#'))
        .map(|line| {
            line.trim_start_matches('#')
                .trim()
                .to_lowercase()
                .chars()
                .filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'))
                .map(|c| if c == ' ' { '-' } else { c })
                .collect()
        })
        .collect()
}

/// Every relative link leads to a file that is there, and to a heading of it where it names one.
#[test]
fn links_lead_somewhere() {
    let mut n_links = 0;
    for page in pages() {
        let text = std::fs::read_to_string(&page).unwrap();
        for link in prose(&text).split("](").skip(1) {
            let link = link.split(')').next().unwrap();
            if link.contains("://") || link.starts_with("mailto:") {
                continue;
            }
            n_links += 1;
            let (file, anchor) = match link.split_once('#') {
                Some((file, anchor)) => (file, Some(anchor)),
                None => (link, None),
            };
            let target = match file {
                "" => page.clone(),
                file => page.parent().unwrap().join(file),
            };
            assert!(
                target.exists(),
                "{}: ({link}): no such file",
                page.display()
            );
            if let Some(anchor) = anchor {
                let headings = anchors(&std::fs::read_to_string(&target).unwrap());
                assert!(
                    headings.iter().any(|heading| heading == anchor),
                    "{}: ({link}): the headings are {headings:?}",
                    page.display()
                );
            }
        }
    }
    assert!(n_links > 20, "{n_links}");
}

/// The calls of `monteclora` in a page's console blocks and code spans, as words.
#[cfg(feature = "mistralrs")]
fn calls(text: &str) -> Vec<Vec<String>> {
    let unfolded = text.replace("\\\n", " ");
    let spans = prose(&unfolded);
    let spans = spans.split('`').skip(1).step_by(2).map(str::to_owned);
    let separators = |c| matches!(c, '|' | ';' | '&' | '\n' | '(' | ')');
    commands(&unfolded)
        .into_iter()
        .chain(spans)
        .flat_map(|command| {
            command
                .split(separators)
                .map(|part| {
                    part.split_whitespace()
                        .take_while(|word| !word.starts_with('#'))
                        .map(str::to_owned)
                        .collect::<Vec<_>>()
                })
                .collect::<Vec<_>>()
        })
        .filter(|words| words.len() > 1 && words[0] == "monteclora")
        .collect()
}

/// Every verb and every flag that the documentation shows is one of the command line's.
#[cfg(feature = "mistralrs")]
#[test]
fn the_flags_shown_exist() {
    use clap::CommandFactory;
    let mut n_flags = 0;
    for page in pages() {
        for words in calls(&std::fs::read_to_string(&page).unwrap()) {
            let shown = format!("{}: {}", page.display(), words.join(" "));
            let mut command = monteclora::cli::Cli::command();
            command.build();
            let mut words = words[1..].iter().peekable();
            while let Some(word) = words.peek() {
                let Some(inner) = command.find_subcommand(word.as_str()).cloned() else {
                    break;
                };
                command = inner;
                words.next();
            }
            for word in words {
                let long = word.strip_prefix("--").filter(|flag| !flag.is_empty());
                let short = word.strip_prefix('-').filter(|flag| {
                    flag.len() == 1 && flag.starts_with(|c: char| c.is_ascii_alphabetic())
                });
                let known = match (long, short) {
                    (Some(flag), _) => {
                        let flag = flag.split('=').next().unwrap();
                        let flag = flag.trim_end_matches(|c: char| !c.is_ascii_alphanumeric());
                        command.get_arguments().any(|argument| {
                            argument
                                .get_long_and_visible_aliases()
                                .is_some_and(|names| names.contains(&flag))
                        })
                    }
                    (None, Some(flag)) => command.get_arguments().any(|argument| {
                        argument
                            .get_short()
                            .is_some_and(|short| flag.starts_with(short))
                    }),
                    (None, None) => continue,
                };
                n_flags += 1;
                assert!(
                    known,
                    "{shown}: {word} is no flag of `{}`",
                    command.get_name()
                );
            }
        }
    }
    assert!(n_flags > 60, "{n_flags}");
}

/// Every command of the tutorial, in its order and in one directory, on a tiny model in place of the one it names.
#[test]
fn the_tutorial_runs() {
    let text = std::fs::read_to_string(docs().join("tutorial.md")).unwrap();
    let commands = commands(&text);
    assert!(commands.len() > 8, "{commands:?}");
    let dir = tempfile::tempdir().unwrap();
    let program = Path::new(env!("CARGO_BIN_EXE_monteclora"))
        .parent()
        .unwrap();
    let path = format!("{}:{}", program.display(), std::env::var("PATH").unwrap());
    for command in commands {
        let command = command.replace("HuggingFaceTB/SmolLM2-135M-Instruct", &tiny());
        let done = Command::new("sh")
            .args(["-ec", &command])
            .current_dir(&dir)
            .env("PATH", &path)
            .env("MONTECLORA_CACHE", dir.path().join("cache"))
            .output()
            .unwrap();
        assert!(
            done.status.success(),
            "$ {command}\n{}{}",
            String::from_utf8_lossy(&done.stdout),
            String::from_utf8_lossy(&done.stderr)
        );
    }
    for made in [
        "out/adapter_model.safetensors",
        "out/report.html",
        "lora/adapter_model.safetensors",
        "merged/config.json",
    ] {
        assert!(dir.path().join(made).is_file(), "{made}");
    }
}
