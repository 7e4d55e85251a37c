//! `deploy`: an adapter into service, with a canary before and the former generation at hand.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use monteclora_converters::{Beside, ConversationSettings, Problem};

use super::{print, print_json};
use crate::cli::{CheckArgs, DeployArgs, ServerArgs};
use crate::deploy::{self, AdapterServer, Check, Releases};
use crate::hub;
use crate::model::open_base;
use crate::provenance::{read_effective, read_effective_on, warn_of_conversation};

/// Environment variable with the key for the server.
const KEY_VARIABLE: &str = "MONTECLORA_KEY";

/// What a new generation is asked when the command line does not say.
const DEFAULT_PROMPT: &str = "Say in one sentence what you can do.";

pub(super) fn run(args: &DeployArgs) -> Result<()> {
    let adapter = match &args.model_id {
        Some(model_id) => {
            let base = hub::locate(model_id, &hub::HubOptions::default())?;
            let files = open_base(&base.dir)?;
            let settings = ConversationSettings::default();
            warn_of_conversation(&args.adapter, &base.dir, settings)?;
            read_effective_on(&args.adapter, &files, args.force)?
        }
        None => read_effective(&args.adapter, args.force)?,
    };
    let beside = Beside::of(&args.adapter)?.nothing_carried("not part of a release");
    if let Some(line) = beside.left_out_line() {
        tracing::info!("left out: {line}");
    }
    let server = server(&args.server)?;
    let mut releases = Releases::open(&args.adapter_root, &args.alias)?;
    let deployed = deploy::deploy(
        &server,
        &mut releases,
        &adapter,
        &args.alias,
        args.base.as_deref(),
        &check(&args.check),
    )?;
    if args.json {
        return print_json(&deployed);
    }
    let was = match &deployed.previous {
        _ if deployed.unchanged => " (it was already)".to_owned(),
        Some(previous) if deployed.can_roll_back => {
            format!(" (before: {previous}; `monteclora rollback` brings it back)")
        }
        Some(previous) => format!(
            " (before: {previous}, which was not deployed from here; deploy its directory to bring it back)"
        ),
        None => String::new(),
    };
    print(&format!(
        "{} answers from {}{was}\n  release {}",
        deployed.alias,
        deployed.generation,
        deployed.directory.display()
    ))
}

/// The server, with the key from a file or the environment.
pub(super) fn server(args: &ServerArgs) -> Result<AdapterServer> {
    let key = match &args.key_file {
        Some(path) => Some(read_key(path)?),
        None => std::env::var(KEY_VARIABLE)
            .ok()
            .filter(|key| !key.is_empty()),
    };
    let timeout = Duration::from_secs(args.timeout);
    Ok(AdapterServer::new(&args.url, key, timeout)?)
}

fn read_key(path: &Path) -> Result<String> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| Problem::usage(format!("--key-file {}: {error}", path.display())))?;
    let mut lines = text.lines().map(str::trim);
    lines
        .find(|line| !line.is_empty() && !line.starts_with('#'))
        .map(str::to_owned)
        .context(Problem::usage(format!(
            "--key-file {} holds no key",
            path.display()
        )))
}

pub(super) fn check(args: &CheckArgs) -> Check {
    let prompts = match args.prompts.as_slice() {
        [] => vec![DEFAULT_PROMPT.to_owned()],
        given => given.to_vec(),
    };
    Check {
        prompts,
        expected: args.expected.clone(),
    }
}
