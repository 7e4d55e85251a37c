//! `push`: uploads an adapter to the Hub, with its model card.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use monteclora_converters::{
    Adapter, Beside, Problem, format_of, json::read_object, training_record,
};
use serde_json::{Value, json};

use super::{print, print_json};
use crate::card::{self, Card};
use crate::cli::PushArgs;
use crate::hub::{Destination, push, require_repo, require_revision};
use crate::provenance::require_effect;

/// Refuses a link that leads out of the directory: what it leads to would be published. The Hub's own cache links to its blobs.
fn require_inside(dir: &Path, name: &str, path: &Path) -> Result<()> {
    let (Ok(dir), Ok(target)) = (dir.canonicalize(), path.canonicalize()) else {
        return Ok(());
    };
    let is_blob = dir
        .ancestors()
        .any(|above| target.parent() == Some(above.join("blobs").as_path()));
    if target.starts_with(&dir) || is_blob {
        return Ok(());
    }
    let message = format!(
        "is a link to `{}`, outside of the adapter's directory",
        target.display()
    );
    let fix = "copy the file into the directory if it is to be published, or remove the link";
    Err(Problem::new("link", format!("`{name}`"), message, fix)
        .exit(2)
        .into())
}

pub(super) fn run(args: &PushArgs) -> Result<()> {
    require_repo(&args.repo)?;
    require_revision(&args.revision)?;
    if !args.adapter.is_dir() {
        let shown = args.adapter.display();
        bail!(Problem::usage(format!(
            "`{shown}`: no such directory; give an adapter's directory"
        )));
    }
    let holds = |name: &str| args.adapter.join(name).is_file();
    if holds("config.json") && !holds("adapter_config.json") {
        let shown = args.adapter.display();
        bail!(Problem::usage(format!(
            "`{shown}` is a model, and adapters are pushed; `hf upload {} {shown}` publishes a model",
            args.repo
        )));
    }
    let adapter = Adapter::read(&args.adapter)?;
    require_effect(&adapter, &args.adapter, args.force)?;
    if let Some(first) = Beside::of(&args.adapter)?.problems.into_iter().next() {
        return Err(first.into());
    }
    let record = training_record(&args.adapter)?.unwrap_or_default();
    let scores = match &args.eval {
        Some(path) => Value::Object(read_object(path)?),
        None => Value::Null,
    };
    let name = args.repo.rsplit('/').next().unwrap_or(&args.repo);
    let card = Card {
        name,
        config: &adapter.config,
        record: &record,
        scores: &scores,
    };
    if !card.write(&args.adapter)? && args.eval.is_some() {
        tracing::warn!(
            "`{}` is a card of your own: it stays, without the scores of --eval",
            args.adapter.join(card::FILE).display()
        );
    }
    // The adapter's own files, and the other files that belong to it.
    let own = format_of(&args.adapter).files(&args.adapter)?;
    let own = own.into_iter().filter(|path| path.is_file());
    let own = own.filter_map(|path| {
        let name = path.file_name()?.to_str()?.to_owned();
        Some((name, path))
    });
    // They now include the card.
    let beside = Beside::of(&args.adapter)?;
    let carried = beside.carried.names();
    let carried = carried
        .iter()
        .map(|name| (name.clone(), args.adapter.join(name)));
    let mut files: Vec<(String, PathBuf)> = own.chain(carried).collect();
    files.sort();
    files.dedup();
    for (name, path) in &files {
        require_inside(&args.adapter, name, path)?;
    }
    let to = Destination {
        repo: &args.repo,
        revision: &args.revision,
        private: args.private,
        message: &args.message,
        token_source: &args.token_source,
    };
    let pushed = push(&files, &to)?;
    let names: Vec<&str> = files.iter().map(|(name, _)| name.as_str()).collect();
    if args.json {
        return print_json(&json!({
            "repo": pushed.repo, "commit": pushed.commit, "url": pushed.url, "files": names, "sent": pushed.sent,
        }));
    }
    let left_out = beside.left_out_line();
    let left_out = left_out.map_or(String::new(), |line| format!("\n  left out  {line}"));
    print(&format!(
        "pushed `{}` to {}: {}\n  {}{left_out}",
        args.adapter.display(),
        pushed.repo,
        names.join(", "),
        pushed.url
    ))
}
