//! The references of run.toml and serve.toml: every key with its type, default and meaning, as the code has them.

use std::collections::BTreeMap;
use std::fmt::Write;

use monteclora::config::DTYPES;
use monteclora_adapters::methods::{
    AdaLoraConfig, Kind, METHODS, SaraConfig, SecondOrderConfig, SsfConfig,
};
use serde_json::Value;

use super::docs;

/// The type whose values are the registry of methods.
const METHOD: &str = "Method";

/// The type whose values are the registry of weights, `auto` and `f16`.
const DTYPE: &str = "DtypeChoice";

/// A field of a structure or a variant of an enumeration.
struct Item {
    name: String,
    kind: String,
    text: String,
}

/// The fields (`pub name: Type,`) or variants (`Name,`, `Name(Type),`) of `name`, with their documentation and serde names.
fn items(sources: &[&str], name: &str) -> Vec<Item> {
    if name == METHOD {
        let item = |kind: &&Kind| Item {
            name: kind.name.to_owned(),
            kind: String::new(),
            text: kind.about.to_owned(),
        };
        return METHODS.iter().map(item).collect();
    }
    if name == DTYPE {
        let item = |[name, about, _]: &[&str; 3]| Item {
            name: (*name).to_owned(),
            kind: String::new(),
            text: format!("{about}."),
        };
        return DTYPES.iter().map(item).collect();
    }
    let (source, start) = sources
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
                    // In a section of run.toml the default follows.
                    let kind = kind.split(" = ").next().unwrap();
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
fn words(sources: &[&str], kind: &str) -> String {
    let inner = |prefix: &str| {
        kind.strip_prefix(prefix)
            .and_then(|rest| rest.strip_suffix('>'))
    };
    if let Some(kind) = inner("Option<") {
        return words(sources, kind);
    }
    if let Some(kind) = inner("Vec<") {
        return format!("list of {}", words(sources, kind));
    }
    if let Some(kind) = inner("IndexMap<String, ") {
        return format!("table of {}", words(sources, kind));
    }
    match kind {
        "usize" | "u64" | "u16" => "whole number".to_owned(),
        "f64" => "number".to_owned(),
        "bool" => "true or false".to_owned(),
        "PathBuf" => "path".to_owned(),
        "String" => "text".to_owned(),
        "FieldNames" => "table of text".to_owned(),
        "Map<String, Value>" => "table".to_owned(),
        "ModuleSelection" => "`\"all-linear\"`, list of names, or regular expression".to_owned(),
        kind => items(sources, kind)
            .iter()
            .map(|item| format!("`\"{}\"`", item.name))
            .collect::<Vec<_>>()
            .join(", "),
    }
}

fn is_enumeration(sources: &[&str], kind: &str) -> bool {
    let defined = |source: &&str| source.contains(&format!("pub enum {kind} {{"));
    [METHOD, DTYPE].contains(&kind) || (kind != "ModuleSelection" && sources.iter().any(defined))
}

/// Rustdoc's links as plain code, and a table's separator kept apart.
fn plain(text: &str) -> String {
    text.replace("[`", "`")
        .replace("`]", "`")
        .replace('|', "\\|")
}

/// A page about one file.
struct Reference {
    /// Name below docs/.
    file: &'static str,
    /// What the page begins with.
    head: String,
    /// Where keys, their types and their descriptions are defined.
    sources: &'static [&'static str],
    /// Sections with the structures that hold them.
    sections: Vec<(&'static str, &'static str)>,
    /// A file that says nothing, every list of sections with one entry.
    defaults: Value,
    /// Keys without a default.
    required: &'static [&'static str],
}

impl Reference {
    fn default(&self, path: &str) -> &Value {
        let parts = path.split('.').filter(|part| !part.is_empty());
        parts.fold(&self.defaults, |value, part| match &value[part] {
            list @ Value::Array(_) if part != path.rsplit('.').next().unwrap() => &list[0],
            value => value,
        })
    }

    /// The default as the page shows it.
    fn shown(&self, section: &str, key: &str) -> String {
        let path = if section.is_empty() {
            key.to_owned()
        } else {
            format!("{section}.{key}")
        };
        if self.required.contains(&path.as_str()) {
            return "required".to_owned();
        }
        match self.default(&path) {
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
    }

    fn page(&self) -> String {
        let mut page = self.head.clone();
        for (section, structure) in &self.sections {
            match *section {
                "" => page.push_str("\n## Before the first section\n"),
                name => {
                    let listed = self.default(name).is_array();
                    let name = if listed {
                        format!("[[{name}]]")
                    } else {
                        format!("[{name}]")
                    };
                    write!(page, "\n## {name}\n").unwrap();
                }
            }
            page.push_str("\n| key | value | default | meaning |\n|---|---|---|---|\n");
            let mut enumerations: BTreeMap<String, String> = BTreeMap::new();
            let mut keys = Vec::new();
            for item in items(self.sources, structure) {
                // Not the sections themselves.
                if !self.sections.iter().any(|(_, s)| item.kind.contains(s)) {
                    keys.push(item);
                }
            }
            for item in keys {
                let Item { name, kind, text } = item;
                writeln!(
                    page,
                    "| `{name}` | {} | {} | {} |",
                    words(self.sources, &kind),
                    self.shown(section, &name),
                    plain(&text)
                )
                .unwrap();
                let bare = kind
                    .trim_start_matches("Option<")
                    .trim_start_matches("Vec<")
                    .trim_end_matches('>');
                if is_enumeration(self.sources, bare) {
                    enumerations.insert(name, bare.to_owned());
                }
            }
            for (key, kind) in enumerations {
                write!(page, "\n`{key}`:\n\n").unwrap();
                for item in items(self.sources, &kind) {
                    writeln!(page, "- `\"{}\"`: {}", item.name, plain(&item.text)).unwrap();
                }
            }
        }
        page
    }

    /// Compares the file with the code, or writes it if asked to.
    fn check(&self) {
        let path = docs().join(self.file);
        let expected = self.page();
        if std::env::var_os("UPDATE_DOCS").is_some() {
            std::fs::write(&path, &expected).unwrap();
        }
        let found = std::fs::read_to_string(&path).unwrap_or_default();
        let old = format!("docs/{} is out of date; run with UPDATE_DOCS=1", self.file);
        if let Some((a, b)) = found.lines().zip(expected.lines()).find(|(a, b)| a != b) {
            panic!("{old}\n  file: {a}\n  code: {b}");
        }
        assert_eq!(found.len(), expected.len(), "{old}");
    }
}

const GENERATED: &str = "Generated from the code; do not edit. `UPDATE_DOCS=1 cargo test --release --workspace configuration_reference` writes it anew.";

#[test]
fn the_configuration_reference_is_that_of_the_code() {
    let minimal = "[model]\nmodel_id = \"m\"\n[data]\ntrain = \"t\"\nvalid = \"v\"\n[train]\noutput_dir = \"o\"\n";
    let resolved = monteclora::config::RunConfig::from_toml(minimal, "run.toml", &[]).unwrap();
    let mut defaults = serde_json::to_value(resolved).unwrap();
    defaults["data"]["valid"] = Value::Null;
    for (section, of_method) in [
        ("adalora", serde_json::to_value(AdaLoraConfig::default())),
        ("ssf", serde_json::to_value(SsfConfig::default())),
        ("sara", serde_json::to_value(SaraConfig::default())),
        (
            "second_order",
            serde_json::to_value(SecondOrderConfig::default()),
        ),
    ] {
        defaults["lora"][section] = of_method.unwrap();
    }
    let reference = Reference {
        file: "configuration.md",
        head: format!(
            "# Configuration reference: run.toml\n\n{GENERATED}\n\n\
             An unknown key is an error that names the nearest known one. Every key can be given on the command line as `--set section.key=value`, which wins over the\n\
             file; the file wins over the defaults. Relative paths are relative to the current directory. `monteclora init` writes a file to begin with. For serve.toml see\n\
             [its reference](serve-configuration.md).\n"
        ),
        sources: &[
            include_str!("../../../src/config/run.rs"),
            include_str!("../../../adapters/src/methods/monteclora.rs"),
            include_str!("../../../adapters/src/methods/adalora.rs"),
            include_str!("../../../adapters/src/methods/sara.rs"),
            include_str!("../../../adapters/src/methods/second_order.rs"),
            include_str!("../../../adapters/src/methods/ssf.rs"),
            include_str!("../../../src/data/example/options.rs"),
        ],
        sections: vec![
            ("", "RunConfig"),
            ("model", "ModelConfig"),
            ("data", "DataConfig"),
            ("lora", "LoraConfig"),
            ("lora.monteclora", "MonteCloraConfig"),
            ("lora.adalora", "AdaLoraConfig"),
            ("lora.ssf", "SsfConfig"),
            ("lora.sara", "SaraConfig"),
            ("lora.second_order", "SecondOrderConfig"),
            ("train", "TrainConfig"),
            ("eval", "EvalConfig"),
        ],
        defaults,
        required: &["model.model_id", "data.train", "train.output_dir"],
    };
    reference.check();
    let page = reference.page();
    for key in [
        "learning_rate",
        "kl_loss_weight",
        "max_steps",
        "num_train_epochs",
        "target_modules",
    ] {
        assert!(page.contains(&format!("| `{key}` |")), "{key}");
    }
}

#[cfg(feature = "mistralrs")]
#[test]
fn the_serve_configuration_reference_is_that_of_the_code() {
    let mut file = mistralrs_monteclora::ServeFile::default();
    file.models.push(Default::default());
    file.models[0].adapters.push(Default::default());
    let reference = Reference {
        file: "serve-configuration.md",
        head: format!(
            "# Configuration reference: serve.toml\n\n{GENERATED}\n\n\
             An unknown key is an error that names the nearest known one; every problem is in one report. Relative paths, and ids that name a directory there, are\n\
             relative to the file. [`examples/serve.toml`](../examples/serve.toml) is a file to begin with; [serve](serve.md) says what the settings do together.\n\n\
             Any key can be overridden by a variable named after its place, lists counted from 0: `MONTECLORA_SERVER__PORT=8080`,\n\
             `MONTECLORA_DEFAULT_MODEL_ID=smollm2`, `MONTECLORA_MODELS__0__DTYPE=f16`, `MONTECLORA_MODELS__0__ADAPTERS__1__SOURCE=/models/triage`. It beats the file and is\n\
             beaten by the command line. Values are TOML, or plain text where the key takes text; an empty variable counts as unset, a misspelt one is an error.\n\
             Three variables are not keys: `MONTECLORA_API_KEYS` and `MONTECLORA_ADMIN_KEYS` hold keys themselves, and `HF_TOKEN` that of the Hub.\n"
        ),
        sources: &[
            include_str!("../../../adapters/mistralrs/src/config.rs"),
            include_str!("../../../adapters/mistralrs/src/config/limits.rs"),
            include_str!("../../../adapters/mistralrs/src/scoring.rs"),
        ],
        sections: vec![
            ("", "ServeFile"),
            ("server", "ServerSection"),
            ("runtime", "RuntimeSection"),
            ("limits", "LimitsSection"),
            ("auth", "AuthSection"),
            ("admin", "AdminSection"),
            ("models", "ModelSection"),
            ("models.quantization", "QuantizationSection"),
            ("models.device", "DeviceSection"),
            ("models.uncertainty", "UncertaintySection"),
            ("models.adapters", "AdapterSection"),
        ],
        defaults: serde_json::to_value(file).unwrap(),
        required: &[
            "models.model_id",
            "models.adapters.alias",
            "models.adapters.source",
        ],
    };
    reference.check();
    let page = reference.page();
    for line in [
        "## [[models.adapters]]",
        "| `max_seqs` | whole number | `32` |",
        "| `type` | text | none |",
    ] {
        assert!(page.contains(line), "{line}");
    }
}
