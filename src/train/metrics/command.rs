//! Sends metrics to a command, for example for Weights & Biases or MLflow.

use std::io::Write;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use monteclora_adapters::Result;

use crate::train::io_error;

/// How long the run waits for the command to end after its last line.
const PATIENCE: Duration = Duration::from_secs(60);

/// A shell command that reads lines of metrics.jsonl. Its failures are logged and do not end the run.
#[derive(Debug)]
pub(super) struct CommandSink {
    command: String,
    child: Child,
    /// `None` once the command has stopped reading.
    input: Option<ChildStdin>,
}

impl CommandSink {
    /// Starts the command. `MONTECLORA_OUTPUT_DIR` is the run's directory, and `MONTECLORA_RESUMED_STEP` the step that
    /// the run continues from, or 0.
    ///
    /// # Errors
    /// Returns an error if the shell cannot be started.
    pub(super) fn start(command: &str, output_dir: &Path, step: u64) -> Result<Self> {
        let (shell, flag) = match cfg!(windows) {
            true => ("cmd", "/C"),
            false => ("sh", "-c"),
        };
        let mut child = Command::new(shell)
            .args([flag, command])
            .env("MONTECLORA_OUTPUT_DIR", output_dir)
            .env("MONTECLORA_RESUMED_STEP", step.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .map_err(io_error(Path::new(shell)))?;
        Ok(Self {
            command: command.to_owned(),
            input: child.stdin.take(),
            child,
        })
    }

    pub(super) fn write(&mut self, line: &[u8]) {
        let Some(input) = &mut self.input else { return };
        if let Err(error) = input.write_all(line).and_then(|()| input.flush()) {
            tracing::warn!(
                "report_to: `{}` reads no more metrics ({error}); the run goes on without it",
                self.command
            );
            self.input = None;
        }
    }
}

impl Drop for CommandSink {
    /// Closes the input, and waits for the command to end, but no longer than [`PATIENCE`].
    fn drop(&mut self) {
        self.input = None;
        let began = Instant::now();
        let command = &self.command;
        while began.elapsed() < PATIENCE {
            match self.child.try_wait() {
                Ok(None) => std::thread::sleep(Duration::from_millis(20)),
                Ok(Some(status)) if status.success() => return,
                Ok(Some(status)) => {
                    tracing::warn!("report_to: `{command}` ended with {status}");
                    return;
                }
                Err(error) => {
                    tracing::warn!("report_to: `{command}`: {error}");
                    return;
                }
            }
        }
        tracing::warn!("report_to: `{command}` still runs; it is not waited for");
    }
}
