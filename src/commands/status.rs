//! `status`: shows the models of a server and their releases.

use anyhow::Result;
use serde_json::{Value, json};

use super::deploy::server;
use super::{print, print_json};
use crate::cli::StatusArgs;
use crate::deploy::{Releases, ServedAdapter};

pub(super) fn run(args: &StatusArgs) -> Result<()> {
    let server = server(&args.server)?;
    let ready = server.is_ready()?;
    let models = server.models()?;
    let adapters = match server.adapters() {
        Ok(adapters) => Some(adapters),
        // With an inference key, or without [admin] on the server, only the list of models is available.
        Err(error) if ["no-endpoint", "unauthorized"].contains(&error.code()) => None,
        Err(error) => return Err(error.into()),
    };
    let mut releases = serde_json::Map::new();
    if let Some(root) = &args.adapter_root {
        for adapter in adapters.iter().flatten() {
            let history = Releases::history_of(root, &adapter.name)?;
            releases.insert(adapter.name.clone(), json!(history));
        }
        for (alias, history) in Releases::all(root)? {
            releases.insert(alias, json!(history));
        }
    }
    if args.json {
        let mut report = json!({
            "server": server.url(), "ready": ready, "models": models, "adapters": adapters,
        });
        if args.adapter_root.is_some() {
            report["releases"] = Value::Object(releases);
        }
        return print_json(&report);
    }
    let ready = match ready {
        Some(true) => "ready",
        Some(false) => "not ready",
        None => "does not tell whether it is ready",
    };
    let mut text = format!("{} {ready}\n", server.url());
    for model in &models {
        let generation = model.generation.as_deref();
        let listed = adapters
            .iter()
            .flatten()
            .find(|adapter| adapter.name == model.id);
        let generation = generation.or(listed.map(|adapter| adapter.generation.as_str()));
        let parent = model.parent.as_deref();
        text.push_str(&format!(
            "  {:<24} {:<14} {}\n",
            model.id,
            generation.unwrap_or("-"),
            parent.map_or_else(String::new, |parent| format!("on {parent}"))
        ));
    }
    // mistral.rs 0.9 lists adapters under other names.
    let named = |adapter: &&ServedAdapter| models.iter().any(|model| model.id == adapter.name);
    for adapter in adapters.iter().flatten().filter(|adapter| !named(adapter)) {
        text.push_str(&format!("  {:<24} {}\n", adapter.name, adapter.generation));
    }
    if adapters.is_none() {
        text.push_str("  which of them are adapters only a server with [admin] tells, to the administrator's key\n");
    }
    for (alias, history) in &releases {
        text.push_str(&format!("releases of {alias}, oldest first\n"));
        if history.as_array().is_none_or(Vec::is_empty) {
            text.push_str("  none\n");
        }
        for record in history.as_array().into_iter().flatten() {
            let field = |key: &str| record[key].as_str().unwrap_or_default().to_owned();
            text.push_str(&format!(
                "  {} {:<8} {:<14} {}\n",
                field("at"),
                field("action"),
                field("generation"),
                field("directory")
            ));
        }
    }
    print(&text)
}
