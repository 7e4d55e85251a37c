//! The texts in the sources that advise a command or a flag of ours.

use std::path::{Path, PathBuf};

/// Words before a flag that make it advice.
const ADVICE: [&str; 9] = [
    "pass", "with", "lower", "raise", "another", "use", "give", "by", "choose",
];

/// Every text outside of tests that advises a command or a flag, with its file.
pub(super) fn advice(root: &Path) -> Vec<(PathBuf, String)> {
    let help = crate::cli::ok(&["--help"]).stdout;
    let listed = help.split("Options:").next().unwrap();
    let commands: Vec<&str> = listed
        .lines()
        .filter(|line| line.starts_with("  "))
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    assert!(commands.contains(&"collapse"), "{help}");
    let mut files = Vec::new();
    for dir in [
        "src",
        "adapters/src",
        "adapters/mistralrs/src",
        "converters/src",
    ] {
        collect(&root.join(dir), &mut files);
    }
    files.sort();
    let mut found = Vec::new();
    for file in files {
        let text = std::fs::read_to_string(&file).unwrap();
        let code = text.split("\n#[cfg(test)]").next().unwrap();
        let texts = literals(code).into_iter();
        let advising = texts.filter(|text| advises(text, &commands));
        let name = file.strip_prefix(root).unwrap().to_owned();
        found.extend(advising.map(|text| (name.clone(), text)));
    }
    found
}

/// Source files that are not tests; the command line's own help is no advice.
fn collect(dir: &Path, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if name.contains("test") || name == "cli" || name == "cli.rs" {
            continue;
        }
        if path.is_dir() {
            collect(&path, files);
        } else if name.ends_with(".rs") {
            files.push(path);
        }
    }
}

/// Whether `text` names one of `commands` after the program's name, or a flag after a word of advice or at the start of a clause.
fn advises(text: &str, commands: &[&str]) -> bool {
    let names_command = text.match_indices("monteclora ").any(|(at, name)| {
        let rest = &text[at + name.len()..];
        let word: String = rest
            .chars()
            .take_while(|c| c.is_ascii_lowercase() || *c == '-')
            .collect();
        commands.contains(&word.as_str())
    });
    let names_flag = text.match_indices('-').any(|(at, _)| {
        let (before, rest) = text.split_at(at);
        let mut next = rest.trim_start_matches('-').chars();
        let is_flag = (rest.starts_with("--")
            && next.next().is_some_and(|c| c.is_ascii_lowercase()))
            || (rest.starts_with("-m")
                && !rest[2..].starts_with(|c: char| c.is_alphanumeric() || c == '-'));
        let before = before.trim_end_matches('`');
        if !is_flag || !before.ends_with([' ', '(']) {
            return false;
        }
        let before = before.trim_end();
        let word = before
            .rsplit(|c: char| !c.is_alphabetic())
            .next()
            .unwrap_or_default();
        before.ends_with([';', '(']) || ADVICE.contains(&word.to_ascii_lowercase().as_str())
    });
    names_command || names_flag
}

/// The string literals of Rust code, without line breaks that the code alone has.
fn literals(code: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut rest = code;
    while let Some(at) = rest.find(['"', '/', '\'']) {
        // A raw string ends where as many signs follow the quote as stood before it.
        let before = &rest[..at];
        let signs = before.len() - before.trim_end_matches('#').len();
        let is_raw = before[..before.len() - signs].ends_with('r');
        rest = &rest[at..];
        if rest.starts_with("//") {
            rest = rest.split_once('\n').map_or("", |(_, rest)| rest);
        } else if rest.starts_with('"') && is_raw {
            let end = format!("\"{}", "#".repeat(signs));
            let (text, after) = rest[1..].split_once(&end).unwrap_or((&rest[1..], ""));
            found.push(text.to_owned());
            rest = after;
        } else if let Some(inside) = rest.strip_prefix('"') {
            let mut is_escaped = false;
            let end = inside.find(|c| {
                let ends = c == '"' && !is_escaped;
                is_escaped = c == '\\' && !is_escaped;
                ends
            });
            let (text, after) = inside.split_at(end.unwrap_or(inside.len()));
            let lines: Vec<&str> = text.split("\\\n").collect();
            let joined = lines.iter().enumerate().map(|(idx, line)| match idx {
                0 => *line,
                _ => line.trim_start(),
            });
            found.push(joined.collect());
            rest = after.get(1..).unwrap_or("");
        } else if rest.starts_with("'\"'") || rest.starts_with("'/'") {
            rest = &rest[3..];
        } else if rest.starts_with("'\\\"'") || rest.starts_with("'\\''") {
            rest = &rest[4..];
        } else {
            rest = &rest[1..];
        }
    }
    found
}

#[test]
fn advice_is_told_from_other_texts() {
    let code = r###"
        // "pass --force" in a comment
        let quote = '"';
        bail("exists; pass --force"); usage("--prompt has no tokens");
        let fix = "run it \
            with `--resume` again"; let raw = r#"monteclora collapse "x""#;
        error("unknown runtime"); info("monteclora is ready; -1 is no flag");
    "###;
    let texts: Vec<String> = literals(code)
        .into_iter()
        .filter(|text| advises(text, &["collapse"]))
        .collect();
    assert_eq!(
        texts,
        [
            "exists; pass --force",
            "run it with `--resume` again",
            "monteclora collapse \"x\""
        ]
    );
}
