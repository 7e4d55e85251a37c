//! The command-line program: parses arguments, runs the command, and sets the exit code.

use std::io::Write;
use std::process::ExitCode;

use clap::FromArgMatches;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use monteclora::cli::{self, Cli, Command};
use monteclora::config::flag_remedy;
use monteclora::{allocator, commands, distributed, logging};

/// Training allocates and frees buffers of megabytes at every operation. The system's allocator returns each buffer to
/// the kernel and must then map its pages again, so mimalloc is used.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Parses the command line. Ends the process with a message if the command line is invalid.
fn parsed() -> Cli {
    let matches = cli::command()
        .try_get_matches()
        .unwrap_or_else(|error| end_of_parsing(&error, answer(&error)));
    Cli::from_arg_matches(&matches).unwrap_or_else(|error| end_of_parsing(&error, None))
}

/// Prints `message`, or what clap says of `error`, and ends the process. All ranks parse the same words; rank 0 prints.
fn end_of_parsing(error: &clap::Error, message: Option<String>) -> ! {
    let code = if error.use_stderr() { 2 } else { 0 };
    if let Err(problem) = distributed::agree("no command") {
        distributed::fail(2, |_| {
            let _ = writeln!(std::io::stderr(), "error: {problem}");
        });
    }
    if distributed::world().is_first() {
        // Nothing is left to do if the stream is closed.
        let _ = match message {
            Some(message) => writeln!(std::io::stderr(), "error: {message}"),
            None => error.print(),
        };
    }
    distributed::finish();
    std::process::exit(code)
}

/// A message about an unknown command, or an unknown flag of `train`, that other programs have; `None` for other
/// errors.
fn answer(error: &clap::Error) -> Option<String> {
    let named = |kind| match error.get(kind) {
        Some(ContextValue::String(name)) => Some(name),
        _ => None,
    };
    if let Some(name) = named(ContextKind::InvalidSubcommand) {
        let hint = cli::hint(name)?;
        return Some(format!(
            "there is no command `{name}`: {hint}\n\nFor all commands, try '--help'."
        ));
    }
    let is_train = std::env::args().nth(1).is_some_and(|name| name == "train");
    let is_unknown = error.kind() == ErrorKind::UnknownArgument && is_train;
    let flag = named(ContextKind::InvalidArg).filter(|_| is_unknown)?;
    let remedy = flag_remedy(flag)?;
    Some(format!(
        "`train` has no flag `{flag}`: {remedy}\n\nFor all flags, try '--help'."
    ))
}

/// Exit code of a run that was interrupted.
const INTERRUPTED: u8 = 130;

/// Whether the command runs for days, so that its log lines need a time.
#[cfg(feature = "mistralrs")]
fn is_server(command: &Command) -> bool {
    matches!(command, Command::Serve(_))
}

/// Without mistral.rs there is no server.
#[cfg(not(feature = "mistralrs"))]
fn is_server(_: &Command) -> bool {
    false
}

fn main() -> ExitCode {
    if let Err(problem) = distributed::start() {
        // Nothing is left to do if standard error is closed.
        let _ = writeln!(std::io::stderr(), "error: {problem}");
        return ExitCode::from(2);
    }
    let cli = parsed();
    #[cfg(feature = "mistralrs")]
    // SAFETY: no other thread has been started.
    unsafe {
        mistralrs_monteclora::spare_engine_threads();
    }
    logging::init(cli.verbose, cli.log_format, is_server(&cli.command));
    // A run needs its freed memory at the next step. A server runs long and idles, so it must not keep it.
    if matches!(
        cli.command,
        Command::Train(_) | Command::Bench(_) | Command::Quickstart(_) | Command::Eval(_)
    ) {
        allocator::keep_freed_memory();
    }
    // Ranks stop a training together, after its checkpoint was written.
    let stop_together = matches!(cli.command, Command::Train(_));
    match commands::run(cli.command) {
        Ok(()) => {
            distributed::finish();
            ExitCode::SUCCESS
        }
        Err(error) => {
            let message = commands::without_escapes(&format!("{error:#}"));
            let code = commands::exit_code(&error);
            let say = |who: &str| {
                // Nothing is left to do if standard error is closed.
                let _ = writeln!(std::io::stderr(), "error: {who}{message}");
            };
            if stop_together && code == INTERRUPTED {
                if distributed::world().is_first() {
                    say("");
                }
                distributed::finish();
            } else {
                distributed::fail(code, say);
            }
            ExitCode::from(code)
        }
    }
}
