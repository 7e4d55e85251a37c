//! The command: parse, dispatch, exit code.

mod allocator;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::Parser;
use monteclora::cli::{Cli, Command};
use monteclora::commands;
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let default = match cli.verbose {
        0 => "warn,monteclora=info,mistralrs_monteclora=info",
        1 => "info,monteclora=debug",
        _ => "debug",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    // A server lives long and idles; a run wants its memory back at the next step.
    if matches!(
        cli.command,
        Command::Train(_) | Command::Bench(_) | Command::Quickstart(_) | Command::Eval(_)
    ) {
        allocator::keep_freed_memory();
    }
    match commands::run(&cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            use std::io::Write;
            // Nothing is left to do if standard error is closed.
            let _ = writeln!(std::io::stderr(), "error: {error:#}");
            ExitCode::from(commands::exit_code(&error))
        }
    }
}
