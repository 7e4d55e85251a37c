//! What `--help` shows beside the arguments: the commands in groups, an example of each, and what to type for what people type.

use clap::{Command, CommandFactory};

use super::Cli;

/// The commands by what they are for, in the order in which a newcomer meets them.
const GROUPS: [(&str, &[&str]); 6] = [
    ("Start", &["quickstart", "init", "doctor"]),
    ("Train", &["data", "train", "tune", "report"]),
    ("Judge", &["eval", "predict", "chat", "fit", "calibrate"]),
    (
        "Export",
        &["merge", "convert", "collapse", "sample", "push"],
    ),
    ("Serve", &["serve", "deploy", "rollback", "status"]),
    (
        "Tools",
        &[
            "inspect",
            "validate",
            "parity",
            "import-gguf",
            "bench",
            "completions",
            "man",
            "help",
        ],
    ),
];

/// The commands that need mistral.rs.
const OF_MISTRALRS: [&str; 5] = ["serve", "deploy", "rollback", "status", "parity"];

/// One example of each command, or more.
const EXAMPLES: [(&str, &str); 30] = [
    ("quickstart", "monteclora quickstart"),
    (
        "init",
        "monteclora init -m HuggingFaceTB/SmolLM2-135M-Instruct --data train.jsonl --valid valid.jsonl",
    ),
    ("doctor", "monteclora doctor"),
    ("data check", "monteclora data check train.jsonl -m BASE"),
    (
        "data preview",
        "monteclora data preview train.jsonl -m BASE",
    ),
    ("data stats", "monteclora data stats train.jsonl -m BASE"),
    (
        "train",
        "monteclora train -c run.toml\nmonteclora train -m BASE --data data/ --lora-r 16 --learning-rate 2e-4 --epochs 3\nmonteclora train -c run.toml --resume auto",
    ),
    (
        "tune",
        "monteclora tune -c run.toml --space space.toml --trials 30",
    ),
    ("report", "monteclora report out"),
    (
        "eval",
        "monteclora eval -a out --data test.jsonl --html eval.html",
    ),
    (
        "predict",
        "monteclora predict -a out --prompt \"I was charged twice.\"\nmonteclora predict -a out --data questions.jsonl --posterior-samples 8 --json",
    ),
    (
        "chat",
        "monteclora chat -a out --system \"Answer in one sentence.\"",
    ),
    ("fit", "monteclora fit -a out --data valid.jsonl -o fitted"),
    (
        "calibrate",
        "monteclora calibrate -a fitted --data valid2.jsonl --posterior-samples 8 --target-error 0.05",
    ),
    ("merge", "monteclora merge -a out -o merged"),
    (
        "convert",
        "monteclora convert out --to gguf -m BASE -o out.gguf",
    ),
    ("collapse", "monteclora collapse out -o lora"),
    ("sample", "monteclora sample out -k 8 -o draws"),
    ("push", "monteclora push out my-org/triage-lora --private"),
    (
        "serve",
        "monteclora serve -c serve.toml\nmonteclora serve --adapter triage=out",
    ),
    (
        "deploy",
        "monteclora deploy out --alias triage --server http://127.0.0.1:1234 --adapter-root adapters",
    ),
    (
        "rollback",
        "monteclora rollback --alias triage --server http://127.0.0.1:1234 --adapter-root adapters",
    ),
    ("status", "monteclora status --server http://127.0.0.1:1234"),
    ("inspect", "monteclora inspect out"),
    (
        "validate",
        "monteclora validate out -m BASE --for vllm --for llamacpp",
    ),
    ("parity", "monteclora parity -m BASE -a out"),
    ("import-gguf", "monteclora import-gguf model.gguf -o model"),
    ("bench train", "monteclora bench train -m BASE"),
    ("man", "monteclora man ~/.local/share/man/man1"),
    (
        "completions",
        "monteclora completions bash > ~/.local/share/bash-completion/completions/monteclora",
    ),
];

/// What people type who come from elsewhere, and the command for it.
const HINTS: [(&[&str], &str); 12] = [
    (
        &[
            "finetune",
            "fine-tune",
            "sft",
            "lora",
            "qlora",
            "fit-lora",
            "run-training",
        ],
        "`monteclora train` fine-tunes; `monteclora quickstart` shows it on a small model",
    ),
    (
        &[
            "generate",
            "infer",
            "inference",
            "ask",
            "complete",
            "completion",
            "run",
        ],
        "`monteclora predict --prompt TEXT` answers once, `monteclora chat` goes on",
    ),
    (
        &["evaluate", "evaluation", "test", "score", "benchmark"],
        "`monteclora eval` scores a data file; `monteclora bench` measures speed",
    ),
    (
        &["fuse-lora", "merge-adapter", "export-merged"],
        "`monteclora merge` writes a model with the adapter in it",
    ),
    (
        &["export", "save", "to-gguf", "gguf"],
        "`monteclora convert` writes other formats of an adapter, `monteclora merge` a whole model",
    ),
    (
        &["quantize", "quantise", "quant"],
        "a quantised base is taken as it is: give a .gguf file with -m; `in_situ_quant` in serve.toml quantises while serving",
    ),
    (
        &["download", "pull", "fetch"],
        "-m takes a Hub id and fetches it: `monteclora inspect` on a directory shows what it holds",
    ),
    (
        &["upload", "publish"],
        "`monteclora push DIR REPO` publishes an adapter on the Hub",
    ),
    (
        &["api", "server", "start", "openai"],
        "`monteclora serve` is the OpenAI-compatible server",
    ),
    (
        &["info", "show", "describe", "ls", "list"],
        "`monteclora inspect` shows an adapter or a model, `monteclora status` what a server serves",
    ),
    (
        &["config", "configure", "new", "setup"],
        "`monteclora init` writes a run.toml",
    ),
    (
        &["preprocess", "tokenize", "dataset"],
        "rows are read as they are; `monteclora data check` and `data preview` show what is made of them",
    ),
];

/// The command line with groups and examples.
pub fn command() -> Command {
    let mut command = Cli::command();
    for (path, text) in EXAMPLES {
        let lines: Vec<String> = text.lines().map(|line| format!("  {line}")).collect();
        let title = if lines.len() == 1 {
            "Example"
        } else {
            "Examples"
        };
        let text = format!("{title}:\n{}", lines.join("\n"));
        command = at(command, path, |command| command.after_help(text));
    }
    let listed = listed(&command);
    command.help_template(format!(
        "{{about-with-newline}}\n{{usage-heading}} {{usage}}\n\n{listed}\nOptions:\n{{options}}\n\nMore of a command: monteclora COMMAND --help\n"
    ))
}

/// `command` with `change` made to the command at `path`, if this build has it.
fn at(command: Command, path: &str, change: impl FnOnce(Command) -> Command) -> Command {
    let (name, rest) = path.split_once(' ').unwrap_or((path, ""));
    if command.find_subcommand(name).is_none() {
        return command;
    }
    command.mut_subcommand(name, |found| match rest {
        "" => change(found),
        rest => at(found, rest, change),
    })
}

/// The commands in their groups, each with its first line.
fn listed(command: &Command) -> String {
    let width = GROUPS
        .iter()
        .flat_map(|(_, names)| *names)
        .map(|name| name.len())
        .max();
    let width = width.unwrap_or_default();
    let mut text = String::new();
    for (title, names) in GROUPS {
        let found = names.iter().filter_map(|name| {
            let about = match command.find_subcommand(name) {
                Some(found) => found.get_about()?.to_string(),
                None if *name == "help" => "This text, or that of a command".to_owned(),
                None => return None,
            };
            Some(format!("  {name:<width$}  {about}\n"))
        });
        let found: String = found.collect();
        if !found.is_empty() {
            text.push_str(&format!("{title}:\n{found}"));
        }
    }
    text
}

/// What to type in place of a command that there is not, or that this build has not.
pub fn hint(name: &str) -> Option<&'static str> {
    if cfg!(not(feature = "mistralrs")) && OF_MISTRALRS.contains(&name) {
        return Some(
            "this program was built without mistral.rs; build it without `--no-default-features`",
        );
    }
    let found = HINTS.iter().find(|(names, _)| names.contains(&name));
    found.map(|(_, hint)| *hint)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_stands_in_one_group_and_has_an_example_that_parses() {
        let command = command();
        let listed: Vec<&str> = GROUPS
            .iter()
            .flat_map(|(_, names)| *names)
            .copied()
            .collect();
        for found in command
            .get_subcommands()
            .filter(|found| !found.is_hide_set())
        {
            let name = found.get_name();
            let n = listed.iter().filter(|listed| **listed == name).count();
            assert_eq!(n, 1, "{name} stands in {n} groups");
            let has = |path: &str| path == name || path.starts_with(&format!("{name} "));
            assert!(
                name == "help" || EXAMPLES.iter().any(|(path, _)| has(path)),
                "{name} has no example"
            );
        }
        for (path, text) in EXAMPLES {
            for line in text.lines() {
                let words = words(line);
                assert!(line.starts_with(&format!("monteclora {path}")), "{line}");
                let parsed = command.clone().try_get_matches_from(words);
                assert!(parsed.is_ok(), "{line}: {}", parsed.expect_err("refused"));
            }
        }
    }

    /// A command line as a shell takes it apart, up to a redirection.
    fn words(line: &str) -> Vec<String> {
        let line = line.split(" > ").next().unwrap_or_default();
        let mut words = Vec::new();
        for (at, part) in line.split('"').enumerate() {
            match at % 2 {
                0 => words.extend(part.split_whitespace().map(str::to_owned)),
                _ => words.push(part.to_owned()),
            }
        }
        words
    }

    #[test]
    fn hints_are_for_what_is_no_command() {
        let command = command();
        for name in OF_MISTRALRS {
            let is_there = command.find_subcommand(name).is_some();
            assert_eq!(is_there, cfg!(feature = "mistralrs"), "{name}");
            assert_eq!(super::hint(name).is_some(), !is_there, "{name}");
        }
        for (names, hint) in HINTS {
            for name in names {
                assert!(
                    command.find_subcommand(name).is_none(),
                    "{name} is a command"
                );
                assert_eq!(super::hint(name), Some(hint), "{name} stands twice");
            }
            let named = hint.split("`monteclora ").skip(1);
            for named in named {
                let word = named.split([' ', '`']).next().unwrap_or_default();
                assert!(command.find_subcommand(word).is_some(), "{word}");
            }
        }
    }
}
