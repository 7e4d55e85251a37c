//! The command: parse, dispatch, exit code.

use std::io::Write;
use std::process::ExitCode;

use clap::FromArgMatches;
use monteclora::cli::{self, Cli, Command};
use monteclora::{allocator, commands, logging};

/// Training allocates and frees buffers of megabytes at every operation; the system's allocator returns each to the kernel and
/// pays for its pages again.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The command line; ends the process with a message where it is none.
fn parsed() -> Cli {
    let matches = cli::command().try_get_matches().unwrap_or_else(|error| {
        use clap::error::{ContextKind, ContextValue};
        let Some(ContextValue::String(name)) = error.get(ContextKind::InvalidSubcommand) else {
            error.exit()
        };
        let Some(hint) = cli::hint(name) else {
            error.exit()
        };
        // Nothing is left to do if standard error is closed.
        let _ = writeln!(
            std::io::stderr(),
            "error: there is no command `{name}`: {hint}\n\nFor all commands, try '--help'."
        );
        std::process::exit(2);
    });
    Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit())
}

/// Whether it goes on for days, so that lines of its log want a time.
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
    let cli = parsed();
    #[cfg(feature = "mistralrs")]
    // SAFETY: no other thread has been started.
    unsafe {
        mistralrs_monteclora::spare_engine_threads();
    }
    logging::init(cli.verbose, cli.log_format, is_server(&cli.command));
    // A server lives long and idles; a run wants its memory back at the next step.
    if matches!(
        cli.command,
        Command::Train(_) | Command::Bench(_) | Command::Quickstart(_) | Command::Eval(_)
    ) {
        allocator::keep_freed_memory();
    }
    match commands::run(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nothing is left to do if standard error is closed.
            let _ = writeln!(std::io::stderr(), "error: {error:#}");
            ExitCode::from(commands::exit_code(&error))
        }
    }
}
