//! `deploy`: puts an adapter into service after a canary test, and keeps the previous generation for a rollback.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use mistralrs_monteclora::check_public_name;
use monteclora_converters::{Beside, ConversationSettings, Problem};

use super::{in_a_line, print, print_json};
use crate::cli::{CheckArgs, DeployArgs, ServerArgs};
use crate::deploy::{self, AdapterServer, Answered, Check, Release, Releases, ServedModel};
use crate::eval::calibration;
use crate::hub;
use crate::model::open_base;
use crate::provenance::{read_effective, read_effective_on, warn_of_conversation};

/// Environment variable with the server's key.
const KEY_VARIABLE: &str = "MONTECLORA_KEY";

/// Default prompt of the canary test.
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
    check_public_name(&args.alias).map_err(|error| Problem::usage(format!("--alias: {error}")))?;
    let server = server(&args.server)?;
    let models = server.models()?;
    let was_calibrated = is_calibrated(&models, &args.alias);
    let release = match is_scored(&models, args)? {
        true => Release::whole(&adapter, &args.adapter)?,
        false => Release::mean(&adapter, &args.adapter)?,
    };
    let mut beside = Beside::of(&args.adapter)?;
    beside = beside.without(&[deploy::RECORD]);
    if release.has_calibration() {
        beside = beside.without(&[calibration::FILE]);
    }
    if let Some(line) = beside
        .nothing_carried("not part of a release")
        .left_out_line()
    {
        tracing::info!("left out: {line}");
    }
    let mut releases = Releases::open(&args.adapter_root, &args.alias)?;
    let mut deployed = deploy::deploy(
        &server,
        &mut releases,
        &release,
        &args.alias,
        args.base.as_deref(),
        &check(&args.check),
    )?;
    if was_calibrated && !is_calibrated(&server.models()?, &args.alias) {
        let message = format!(
            "the scores of `{}` were calibrated, and are no longer: no calibration came with this adapter that holds on the server",
            deployed.alias
        );
        tracing::warn!("{message}");
        deployed.warnings.push(message);
    }
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
    let holds = holds(deployed.posterior, deployed.calibration);
    print(&format!(
        "{} answers from {}{was}\n  release {}{holds}\n{}",
        deployed.alias,
        deployed.generation,
        deployed.directory.display(),
        asked(&deployed.canary)
    ))
}

/// The content of a release besides the mean, in words.
pub(super) fn holds(posterior: bool, calibration: bool) -> &'static str {
    match (posterior, calibration) {
        (true, true) => ", with posterior and calibration",
        (true, false) => ", with posterior",
        (false, true) => ", with calibration",
        (false, false) => "",
    }
}

/// The prompts and answers of the canary test, as lines.
pub(super) fn asked(answers: &[Answered]) -> String {
    let lines = answers.iter().map(|asked| {
        let answer = match in_a_line(&asked.answer) {
            answer if answer.is_empty() => "(an empty answer)".to_owned(),
            answer => answer,
        };
        format!("  asked   {}\n  answer  {answer}", in_a_line(&asked.prompt))
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// Whether the server's scores for `alias` are calibrated.
fn is_calibrated(models: &[ServedModel], alias: &str) -> bool {
    let found = models.iter().find(|model| model.id == alias);
    found.is_some_and(|model| model.is_calibrated)
}

/// Whether the server scores answers on the base model that the alias belongs to or will belong to. Only then does a
/// release contain posterior and calibration, since other servers refuse a posterior.
fn is_scored(models: &[ServedModel], args: &DeployArgs) -> Result<bool> {
    let alias = models.iter().find(|model| model.id == args.alias);
    let base = args.base.as_deref();
    let base = base.or_else(|| alias.and_then(|model| model.parent.as_deref()));
    let bases = models.iter().filter(|model| model.parent.is_none());
    let mut bases = bases.filter(|model| base.is_none_or(|base| model.id == base));
    let is_scored = bases.next().is_some_and(|model| model.is_scored);
    if bases.any(|model| model.is_scored != is_scored) {
        let message = "the server scores the answers of some of its bases: say with --base which one is meant";
        return Err(Problem::usage(message).into());
    }
    Ok(is_scored)
}

/// A client for the server, with the key from a file or the environment.
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
        system: args.system.clone(),
        expected: args.expected.clone(),
    }
}
