//! Steps of a deployment: canary, swap, verification, and restoration if one of them fails.

use std::path::{Path, PathBuf};

use monteclora_converters::Problem;
use serde::Serialize;

use super::client::{AdapterServer, Form, ServedModel};
use super::error::{Error, failed, nothing_to_restore};
use super::history::{Action, Releases};
use super::release::Release;

/// Questions that every new generation is asked, and texts that its answers must contain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Check {
    /// Questions. The server must answer each without an error; an empty answer is valid.
    pub prompts: Vec<String>,
    /// The system message of each question.
    pub system: Option<String>,
    /// Texts that must occur in the answers; each in at least one.
    pub expected: Vec<String>,
}

/// A question and its answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Answered {
    /// The question.
    pub prompt: String,
    /// The greedy answer.
    pub answer: String,
}

/// A deployment that succeeded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Deployed {
    /// Name that clients use.
    pub alias: String,
    /// The generation that is served now.
    pub generation: String,
    /// The generation that was served before.
    pub previous: Option<String>,
    /// Release directory, relative to the adapter root.
    pub directory: PathBuf,
    /// Whether the posterior is in the release.
    pub posterior: bool,
    /// Whether a calibration is in the release.
    pub calibration: bool,
    /// Possible faults of the release that the server reports.
    pub warnings: Vec<String>,
    /// Whether this content was already served, so that nothing was swapped.
    pub unchanged: bool,
    /// Whether a rollback can bring `previous` back.
    pub can_roll_back: bool,
    /// The canary's answers.
    pub canary: Vec<Answered>,
    /// Whether the alias gives exactly the canary's answers. They may differ, because other traffic changes the
    /// rounding.
    pub same_answers: bool,
}

/// A rollback that succeeded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RolledBack {
    /// Name that clients use.
    pub alias: String,
    /// The generation that is served now.
    pub generation: String,
    /// The generation that was served before.
    pub previous: String,
    /// Release directory, relative to the adapter root.
    pub directory: PathBuf,
    /// Whether the posterior is in the release.
    pub posterior: bool,
    /// Whether a calibration is in the release.
    pub calibration: bool,
    /// Possible faults of the restored release.
    pub warnings: Vec<String>,
    /// Its answers to the questions of the check.
    pub answers: Vec<Answered>,
}

/// Puts `release` into service as `alias`. The base is `model` if given, else that of the replaced generation, else the
/// server's choice.
///
/// The server first loads the release as a canary under another name, and the canary is asked. Only then the release
/// replaces the generation that was served at the start, and is asked again. If that fails, the former generation is
/// restored.
///
/// # Errors
/// Returns an error if a request fails, or if the canary or the verification fails; the latter say what is served now.
pub fn deploy(
    server: &AdapterServer,
    releases: &mut Releases,
    release: &Release,
    alias: &str,
    model: Option<&str>,
    check: &Check,
) -> Result<Deployed, Error> {
    let current = server.adapter(alias)?;
    let is_base = |model: &ServedModel| model.id == alias && model.parent.is_none();
    if current.is_none() && server.models()?.iter().any(is_base) {
        let message =
            format!("`{alias}` is a base model of the server; give the adapter another --alias");
        return Err(Problem::usage(message).into());
    }
    if let Some(current) = &current {
        releases.adopt(current)?;
    }
    let former_base = current
        .as_ref()
        .and_then(|current| current.parent.as_deref());
    let base = model.or(former_base);
    let directory = releases.store(release)?;
    let path = portable(&directory);
    let canary_name = format!("{alias}-canary");
    require_free(server, releases, &canary_name)?;
    tracing::info!("loading the canary `{canary_name}`");
    let loaded = server.load_over(&canary_name, &path, base)?;
    let (canary_generation, warnings) = (loaded.generation, loaded.warnings);
    for warning in &warnings {
        tracing::warn!("{warning}");
    }
    let canary = ask(server, &canary_name, check);
    // The swap uses the base that the canary was asked on, even if the server chose it.
    let listed = server.adapter(&canary_name).ok().flatten();
    let canary_base = listed.and_then(|canary| canary.parent);
    let base = base.or(canary_base.as_deref());
    // The swap needs the canary's memory. A canary that cannot be unloaded is not a failure.
    if let Err(error) = server.unload(&canary_name, None) {
        tracing::warn!("the canary `{canary_name}` is still loaded: {error}");
    }
    let canary = canary.map_err(|reason| {
        let outcome = match &current {
            Some(current) => format!("`{alias}` still answers from {}", current.generation),
            None => format!("`{alias}` was not loaded"),
        };
        failed("canary", reason, outcome)
    })?;
    let previous = current.as_ref().map(|current| current.generation.clone());
    let can_roll_back = previous
        .as_deref()
        .is_some_and(|previous| releases.find(previous).is_some());
    // The same content on another base is another model.
    let base_stays = former_base.is_none() || base == former_base;
    if base_stays && previous.as_ref() == Some(&canary_generation) {
        if !can_roll_back {
            releases.record(Action::Adopt, &canary_generation, &directory, None, base)?;
        }
        return Ok(Deployed {
            alias: alias.to_owned(),
            generation: canary_generation,
            previous,
            directory,
            posterior: release.has_posterior(),
            calibration: release.has_calibration(),
            warnings,
            unchanged: true,
            can_roll_back: true,
            canary,
            same_answers: true,
        });
    }

    tracing::info!("swapping `{alias}`");
    let generation = server
        .load(alias, &path, base, previous.as_deref())?
        .generation;
    match verify(server, alias, &generation, check) {
        Ok(answers) => {
            let previous_name = previous.as_deref();
            releases.record(Action::Deploy, &generation, &directory, previous_name, base)?;
            // The same content on another base has the same generation, which therefore cannot name the way back.
            let can_roll_back = can_roll_back && previous_name != Some(&*generation);
            Ok(Deployed {
                alias: alias.to_owned(),
                same_answers: answers == canary,
                generation,
                previous,
                directory,
                posterior: release.has_posterior(),
                calibration: release.has_calibration(),
                warnings,
                unchanged: false,
                can_roll_back,
                canary,
            })
        }
        Err(reason) => {
            let source = previous.as_deref().and_then(|previous| {
                let released = releases.find(previous);
                let released = released.map(|record| portable(&record.directory));
                released.or_else(|| current.as_ref()?.source.clone())
            });
            let undone = undo(
                server,
                alias,
                &generation,
                previous.as_deref(),
                source.as_deref(),
                former_base,
            );
            if !undone.left {
                releases.record(
                    Action::Deploy,
                    &generation,
                    &directory,
                    previous.as_deref(),
                    base,
                )?;
            }
            Err(failed("verification", reason, undone.outcome))
        }
    }
}

/// Refuses if another model already has the canary's name. A canary of an interrupted deployment is replaced.
fn require_free(server: &AdapterServer, releases: &Releases, name: &str) -> Result<(), Error> {
    let is_left_behind = |source: &String| releases.is_below(source);
    let taken = match server.adapter(name)? {
        Some(found) => !found.source.as_ref().is_some_and(is_left_behind),
        None => server.models()?.iter().any(|model| model.id == name),
    };
    match taken {
        false => Ok(()),
        true => Err(Problem::usage(format!(
            "the server has a model `{name}`, which the canary would be called; give the adapter another --alias"
        ))
        .into()),
    }
}

/// Result of taking a generation out of service.
struct Undone {
    /// Sentence that says what is served now.
    outcome: String,
    /// Whether the failed generation is out of service.
    left: bool,
}

/// Takes a failed generation out of service and restores the previous one, if there is one.
fn undo(
    server: &AdapterServer,
    alias: &str,
    failed: &str,
    previous: Option<&str>,
    source: Option<&str>,
    base: Option<&str>,
) -> Undone {
    let outcome = match (previous, source) {
        (None, _) => server
            .unload(alias, Some(failed))
            .map(|()| format!("`{alias}` was unloaded")),
        (Some(previous), Some(source)) => server
            .load(alias, source, base, Some(failed))
            .map(|loaded| {
                let now = loaded.generation;
                if now == previous {
                    format!("`{alias}` was rolled back to {previous}")
                } else {
                    format!(
                        "`{alias}` answers from {now}, which is what `{source}` holds now: {previous} is no more"
                    )
                }
            }),
        (Some(previous), None) => {
            return Undone {
                outcome: format!(
                    "`{alias}` still answers from {failed}: where {previous} came from is not known here"
                ),
                left: false,
            };
        }
    };
    Undone {
        left: outcome.is_ok(),
        outcome: outcome.unwrap_or_else(|error| {
            format!("`{alias}` could not be rolled back and answers from {failed}: {error}")
        }),
    }
}

/// Restores the generation that `alias` had before, or the one whose name begins with `to`. If that generation fails
/// the check, the generation that was being served is restored.
///
/// # Errors
/// Returns `nothing-to-restore` if there is no generation to go back to. If the verification fails, the error says what
/// is served now.
pub fn roll_back(
    server: &AdapterServer,
    releases: &mut Releases,
    alias: &str,
    to: Option<&str>,
    check: &Check,
) -> Result<RolledBack, Error> {
    let current = server.adapter(alias)?.ok_or_else(|| {
        nothing_to_restore(format!("the server has no adapter `{alias}` to roll back"))
    })?;
    let record = match to {
        Some(to) => releases.find(to),
        None => releases.before(&current),
    };
    let Some(record) = record.cloned() else {
        let wanted = to.map_or("an earlier generation".to_owned(), |to| format!("`{to}`"));
        return Err(nothing_to_restore(format!(
            "{wanted} of `{alias}` is not among its releases; `monteclora status --adapter-root` lists them, and `monteclora deploy` with the directory of an older adapter brings that one back"
        )));
    };
    let path = portable(&record.directory);
    let base = record.base.as_deref().or(current.parent.as_deref());
    let release = releases.read(&record)?;
    // The alias may now be on another base, where the server does not score answers.
    let is_scored = |server: &AdapterServer| {
        let served = server.adapter(alias).ok().flatten();
        served.is_some_and(|served| served.content.is_some())
    };
    let loaded = server.load(alias, &path, base, Some(&current.generation))?;
    let (generation, mut warnings) = (loaded.generation, loaded.warnings);
    if generation == current.generation {
        let message = format!(
            "`{}` is what `{alias}` answers from already ({generation}); give another generation with --to",
            record.directory.display()
        );
        return Err(nothing_to_restore(message));
    }
    if generation != record.generation {
        warnings.push(format!(
            "`{}` was {} when it was served last, and is {generation} now: the base, the scores or the files are others",
            record.directory.display(),
            record.generation
        ));
    }
    if is_scored(server) && !release.has_posterior() && !release.has_calibration() {
        warnings.push(format!(
            "`{}` has no posterior and no calibration: its scores are those of the mean, and no answer is held back",
            record.directory.display()
        ));
    }
    for warning in &warnings {
        tracing::warn!("{warning}");
    }
    let verified = verify(server, alias, &generation, check);
    let undone = match &verified {
        Ok(_) => None,
        Err(_) => {
            // Restore the state from before the rollback.
            let released = releases.find(&current.generation);
            let released = released.map(|record| portable(&record.directory));
            let source = released.or_else(|| current.source.clone());
            Some(undo(
                server,
                alias,
                &generation,
                Some(&current.generation),
                source.as_deref(),
                current.parent.as_deref(),
            ))
        }
    };
    if !undone.as_ref().is_some_and(|undone| undone.left) {
        releases.record(
            Action::Rollback,
            &generation,
            &record.directory,
            Some(&current.generation),
            base,
        )?;
    }
    let answers = match (verified, undone) {
        (Err(reason), Some(undone)) => return Err(failed("verification", reason, undone.outcome)),
        (verified, _) => verified.unwrap_or_default(),
    };
    Ok(RolledBack {
        alias: alias.to_owned(),
        generation,
        previous: current.generation,
        directory: record.directory,
        posterior: release.has_posterior(),
        calibration: release.has_calibration(),
        warnings,
        answers,
    })
}

/// Asks the questions; the error says what is wrong with the answers.
fn ask(server: &AdapterServer, model: &str, check: &Check) -> Result<Vec<Answered>, String> {
    let models = server.models().map_err(|error| error.to_string())?;
    let found = models.iter().find(|found| found.id == model);
    let form = found.map_or(Form::Chat, |found| found.form);
    let mut answers = Vec::new();
    for prompt in &check.prompts {
        let answer = server
            .ask(model, check.system.as_deref(), prompt, form)
            .map_err(|error| error.to_string())?;
        answers.push(Answered {
            prompt: prompt.clone(),
            answer,
        });
    }
    let missing = check.expected.iter().find(|expected| {
        !answers
            .iter()
            .any(|answered| answered.answer.contains(*expected))
    });
    match missing {
        Some(missing) => Err(format!(
            "no answer holds {missing:?}; the last was {:?}",
            answers.last().map_or("", |answered| &answered.answer)
        )),
        None => Ok(answers),
    }
}

/// The answers of `alias`. Returns an error if the server does not list it at `generation`.
fn verify(
    server: &AdapterServer,
    alias: &str,
    generation: &str,
    check: &Check,
) -> Result<Vec<Answered>, String> {
    let listed = server.adapter(alias).map_err(|error| error.to_string())?;
    let listed = listed.map(|adapter| adapter.generation);
    if listed.as_deref() != Some(generation) {
        return Err(format!(
            "the server lists {} instead of {generation}",
            listed.as_deref().unwrap_or("nothing")
        ));
    }
    ask(server, alias, check)
}

/// A relative path with `/` as the separator, as servers expect.
fn portable(path: &Path) -> String {
    let parts: Vec<_> = path
        .iter()
        .map(|part| part.to_string_lossy().into_owned())
        .collect();
    parts.join("/")
}
