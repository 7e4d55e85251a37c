//! The commands of the program, one file per command.

mod bench;
mod calibrate;
mod chat;
mod collapse;
mod completions;
mod convert;
mod data;
#[cfg(feature = "mistralrs")]
mod deploy;
mod doctor;
mod dry_run;
mod eval;
mod export;
mod fit;
mod import_gguf;
mod init;
mod inspect;
mod man;
mod merge;
mod named_base;
mod opened;
#[cfg(feature = "mistralrs")]
mod parity;
mod predict;
mod push;
mod quickstart;
mod report;
#[cfg(feature = "mistralrs")]
mod rollback;
mod sample;
#[cfg(feature = "mistralrs")]
mod serve;
#[cfg(feature = "mistralrs")]
mod status;
mod train;
mod tune;
mod validate;

use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, bail};
use candle_core::Device;
use monteclora_adapters::weights::{AUTO, Kind};
use monteclora_converters::{Problem, shell_word};
use serde::Serialize;

use crate::cli::{BenchCommand, Command, ModelOptions};
use crate::config::DtypeChoice;
use crate::distributed::{agree, local_rank, world};
use crate::hub::HubOptions;

/// The shell command that starts this program: its name if PATH finds it, otherwise its path, relative if the program
/// is below the current directory.
fn program() -> String {
    const NAME: &str = env!("CARGO_PKG_NAME");
    let Ok(own) = std::env::current_exe() else {
        return NAME.to_owned();
    };
    let own = own.canonicalize().unwrap_or(own);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let file = format!("{NAME}{}", std::env::consts::EXE_SUFFIX);
    let mut found = std::env::split_paths(&path).map(|dir| dir.join(&file));
    if found
        .find(|path| path.is_file())
        .and_then(|path| path.canonicalize().ok())
        .is_some_and(|path| path == own)
    {
        return NAME.to_owned();
    }
    let here = std::env::current_dir().and_then(|dir| dir.canonicalize());
    let below = here
        .ok()
        .and_then(|here| own.strip_prefix(here).ok().map(Path::to_path_buf));
    let shown = match below {
        // A shell would search PATH for a name without a directory.
        Some(below) if below.components().count() == 1 => Path::new(".").join(below),
        Some(below) => below,
        None => own,
    };
    shell_word(&shown.display().to_string())
}

/// A text whose control characters are visible, so that what a file or a server says cannot steer the terminal. Line ends and tabs stay.
pub fn without_escapes(text: &str) -> String {
    let shown = |c: char| match c {
        '\n' | '\t' => c.to_string(),
        c if c.is_control() => c.escape_default().to_string(),
        c => c.to_string(),
    };
    text.chars().map(shown).collect()
}

/// A text in one line, without control characters.
fn in_a_line(text: &str) -> String {
    let words: Vec<&str> = text.split_whitespace().collect();
    words.join(" ").replace(char::is_control, "")
}

/// The error for unusable data, after the rows were reported.
fn bad_data(message: impl Into<String>) -> anyhow::Error {
    Problem::sentence("data", message).exit(3).into()
}

/// The error for wrong numerical results.
fn numerical(message: impl Into<String>) -> anyhow::Error {
    Problem::sentence("numbers", message).exit(5).into()
}

/// The error for a run that was interrupted.
fn interrupted(message: impl Into<String>) -> anyhow::Error {
    Problem::sentence("interrupted", message).exit(130).into()
}

/// Runs a command.
///
/// # Errors
/// Returns the error of the command; [`exit_code`] classifies it.
pub fn run(mut command: Command) -> Result<()> {
    match &mut command {
        Command::Eval(args) => args.model.settle(args.adapter.first())?,
        Command::Predict(args) => args.model.settle(args.adapter.first())?,
        Command::Chat(args) => args.model.settle(args.adapter.as_ref())?,
        Command::Fit(args) => args.model.settle(Some(&args.adapter))?,
        Command::Calibrate(args) => args.model.settle(Some(&args.adapter))?,
        Command::Merge(args) => args.model.settle(Some(&args.adapter))?,
        #[cfg(feature = "mistralrs")]
        Command::Parity(args) => args.model.settle(args.adapter.as_ref())?,
        _ => {}
    }
    if world().size() > 1 {
        agree(&work(&command))?;
        require_divisible(&command)?;
    }
    match &command {
        Command::Quickstart(args) => quickstart::run(args),
        Command::Init(args) => init::run(args),
        Command::Train(args) => train::run(args),
        Command::Tune(args) => tune::run(args),
        Command::Eval(args) => eval::run(args),
        Command::Predict(args) => predict::run(args),
        Command::Chat(args) => chat::run(args),
        Command::Fit(args) => fit::run(args),
        Command::Calibrate(args) => calibrate::run(args),
        Command::Report(args) => report::run(args),
        Command::Data(command) => data::run(command),
        Command::Collapse(args) => collapse::run(args),
        Command::Convert(args) => convert::run(args),
        Command::Sample(args) => sample::run(args),
        Command::Merge(args) => merge::run(args),
        Command::Push(args) => push::run(args),
        Command::Inspect(args) => inspect::run(args),
        Command::Validate(args) => validate::run(args),
        #[cfg(feature = "mistralrs")]
        Command::Parity(args) => parity::run(args),
        #[cfg(feature = "mistralrs")]
        Command::Serve(args) => serve::run(args),
        #[cfg(feature = "mistralrs")]
        Command::Deploy(args) => deploy::run(args),
        #[cfg(feature = "mistralrs")]
        Command::Rollback(args) => rollback::run(args),
        #[cfg(feature = "mistralrs")]
        Command::Status(args) => status::run(args),
        Command::ImportGguf(args) => import_gguf::run(args),
        Command::Doctor(args) => doctor::run(args),
        Command::Man { dir } => man::run(dir),
        Command::Completions { shell } => completions::run(*shell),
        Command::Bench(BenchCommand::Train(args)) => bench::run(args),
        Command::Bench(BenchCommand::Matmul(args)) => bench::matmul(args),
        Command::Bench(BenchCommand::Generate(args)) => bench::generate(args),
    }
}

/// What a command does, for the comparison with other ranks.
fn work(command: &Command) -> String {
    match command {
        Command::Train(args) if args.dry_run => "train --dry-run".to_owned(),
        Command::Train(args) if args.config.is_none() => "train without a file".to_owned(),
        Command::Train(_) => "train -c".to_owned(),
        Command::Eval(_) => "eval".to_owned(),
        Command::Fit(_) => "fit".to_owned(),
        Command::Calibrate(_) => "calibrate".to_owned(),
        Command::Predict(args) if args.data.is_some() => "predict --data".to_owned(),
        _ => "another command".to_owned(),
    }
}

/// Checks that the command divides its work among ranks.
///
/// # Errors
/// Returns an error if each rank would do the same work.
fn require_divisible(command: &Command) -> Result<()> {
    match command {
        Command::Train(_) | Command::Eval(_) | Command::Fit(_) | Command::Calibrate(_) => Ok(()),
        Command::Predict(args) if args.data.is_some() => Ok(()),
        _ => bail!(Problem::usage(
            "this command runs as one process; start it without mpirun, which is for train, eval, fit, calibrate and predict --data"
        )),
    }
}

/// Exit code of an error: 2 usage and missing paths, 3 data, 4 adapters and models, 5 numerical, 130 interrupted, else
/// 1.
pub fn exit_code(error: &anyhow::Error) -> u8 {
    exit_code_of(error.as_ref())
}

/// Exit code of an error that another error contains.
fn exit_code_of(error: &(dyn std::error::Error + 'static)) -> u8 {
    monteclora_converters::exit_code(error, classify)
}

fn classify(error: &(dyn std::error::Error + 'static)) -> Option<u8> {
    if let Some(monteclora_adapters::Error::Format(error)) = error.downcast_ref() {
        return Some(exit_code_of(error));
    }
    #[cfg(feature = "mistralrs")]
    if let Some(error) = error.downcast_ref::<mistralrs_monteclora::Error>() {
        return Some(error.exit_code());
    }
    None
}

impl ModelOptions {
    /// Options for downloading this model from the Hub.
    fn hub(&self) -> HubOptions {
        HubOptions {
            revision: self.revision.clone(),
            token_source: self.token_source.clone(),
        }
    }
}

/// The device to compute on: an accelerator if the build supports one and `cpu` is false, otherwise the CPU. Each rank of
/// a machine has a CUDA device of its own.
pub(crate) fn device(cpu: bool) -> Result<Device> {
    let device = if cpu {
        Device::Cpu
    } else if cfg!(feature = "metal") {
        Device::new_metal(0)?
    } else {
        Device::cuda_if_available(local_rank())?
    };
    Ok(device)
}

/// Whether [`device`] is the CPU, as far as the build tells. No device is opened.
pub(crate) fn computes_on_cpu(cpu: bool) -> bool {
    cpu || !cfg!(any(feature = "cuda", feature = "metal"))
}

/// How our decoder holds the base model's weights for `dtype`. It is an error if the decoder does not support `dtype`.
pub(crate) fn weight_type(dtype: DtypeChoice) -> Result<&'static Kind> {
    let holder = format!("--dtype {}: our decoder", dtype.0);
    Ok(dtype.kind(&AUTO, &holder, "")?)
}

/// Writes the result of a command to stdout: one JSON object, or text.
fn show(json: bool, found: &impl Serialize, text: impl FnOnce() -> String) -> Result<()> {
    match json {
        true => print_json(found),
        false => print(&text()),
    }
}

/// Writes one JSON object to stdout; of several ranks, the first does.
pub(crate) fn print_json(value: &impl Serialize) -> Result<()> {
    if !world().is_first() {
        return Ok(());
    }
    let mut out = std::io::stdout().lock();
    serde_json::to_writer(&mut out, value).context("cannot write to standard output")?;
    writeln!(out).context("cannot write to standard output")
}

/// Writes text to stdout; of several ranks, the first does.
pub(crate) fn print(text: &str) -> Result<()> {
    if !world().is_first() {
        return Ok(());
    }
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", text.trim_end_matches('\n')).context("cannot write to standard output")
}
