//! The command: parse, dispatch, exit code.

use std::process::ExitCode;

use clap::Parser;
use monteclora::cli::{Cli, Command};
use monteclora::{allocator, commands, logging};

/// Training allocates and frees buffers of megabytes at every operation; the system's allocator returns each to the kernel and
/// pays for its pages again.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let cli = Cli::parse();
    #[cfg(feature = "mistralrs")]
    // SAFETY: no other thread has been started.
    unsafe {
        mistralrs_monteclora::spare_engine_threads();
    }
    logging::init(cli.verbose, cli.log_format);
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
