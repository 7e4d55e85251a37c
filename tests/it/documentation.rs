//! The documentation is what the program does: the configuration references are generated from the code, the tutorial runs.

mod memory;
mod reference;

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::cli::tiny;

fn docs() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/docs"))
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

/// The pages of docs/ and those at the root.
fn pages() -> Vec<PathBuf> {
    let mut pages: Vec<PathBuf> = std::fs::read_dir(docs())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "md"))
        .collect();
    let at_root = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"];
    pages.extend(at_root.map(|name| docs().join("..").join(name)));
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

/// Every serve.toml that is shipped: the example's, and those inside Kubernetes manifests.
#[cfg(feature = "mistralrs")]
#[test]
fn every_serve_toml_shipped_is_valid() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let dir = tempfile::tempdir().unwrap();
    let mut shipped = vec![root.join("examples/serve.toml")];
    for entry in std::fs::read_dir(root.join("deploy")).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            continue;
        }
        let text = std::fs::read_to_string(&path).unwrap();
        let Some((_, block)) = text.split_once("\n  serve.toml: |\n") else {
            continue;
        };
        let lines: Vec<&str> = block
            .lines()
            .map_while(|line| line.strip_prefix("    "))
            .collect();
        let copy = dir
            .path()
            .join(path.file_name().unwrap())
            .with_extension("toml");
        std::fs::write(&copy, lines.join("\n")).unwrap();
        shipped.push(copy);
    }
    assert!(shipped.len() >= 3, "{shipped:?}");
    for path in shipped {
        let file =
            mistralrs_monteclora::ServeFile::read(&path).unwrap_or_else(|error| panic!("{error}"));
        assert!(!file.models[0].model_id.is_empty(), "{}", path.display());
    }
}

/// The scripts for schedulers: bash reads them, and every `monteclora ...` in them is a command line that parses.
#[test]
fn scheduler_examples_are_valid() {
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
    let mut n_commands = 0;
    for entry in std::fs::read_dir(examples).unwrap() {
        let path = entry.unwrap().path();
        let extension = path.extension().and_then(|found| found.to_str());
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        let words = match extension {
            Some("sbatch") => {
                let read = Command::new("bash").arg("-n").arg(&path).status();
                assert!(read.unwrap().success(), "{}", path.display());
                let lines = text
                    .lines()
                    .map(str::trim)
                    .filter(|line| !line.starts_with('#'));
                let calls = lines.filter_map(|line| Some(line.split_once("monteclora ")?.1));
                calls
                    .map(|call| call.split_whitespace().map(str::to_owned).collect())
                    .collect()
            }
            Some("yaml") => {
                let entries = text
                    .lines()
                    .filter_map(|line| line.trim().strip_prefix("- "));
                let entries = entries.map(|word| word.trim_matches('"').to_owned());
                let call = entries.skip_while(|word| word != "monteclora").skip(1);
                vec![call.take_while(|word| !word.contains(':')).collect()]
            }
            _ => Vec::<Vec<String>>::new(),
        };
        for call in words {
            let plain = call.iter().take_while(|word| !word.starts_with(['>', '&']));
            // An array of flags stands for none.
            let plain = plain.filter(|word| !word.contains("[@]"));
            let all = std::iter::once("monteclora").chain(plain.map(String::as_str));
            let found = monteclora::cli::command().try_get_matches_from(all);
            assert!(
                found.is_ok(),
                "{}: {call:?}: {:?}",
                path.display(),
                found.err()
            );
            n_commands += 1;
        }
    }
    assert!(n_commands >= 4, "{n_commands}");
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
