//! Sends metrics to a command, for example for Weights & Biases or MLflow.

use std::io::Write;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
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
    /// Lines on their way to the command; `None` once it has stopped reading.
    lines: Option<SyncSender<Vec<u8>>>,
}

/// Lines that wait for a command that reads slowly. A command that is further behind is left alone: training does not wait for it.
const WAITING: usize = 1024;

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
        let (lines, to_write) = sync_channel(WAITING);
        if let Some(input) = child.stdin.take() {
            // A pipe that is full would hold up the training.
            std::thread::spawn(move || feed(input, &to_write));
        }
        Ok(Self {
            command: command.to_owned(),
            lines: Some(lines),
            child,
        })
    }

    pub(super) fn write(&mut self, line: &[u8]) {
        let Some(lines) = &self.lines else { return };
        let why = match lines.try_send(line.to_vec()) {
            Ok(()) => return,
            Err(TrySendError::Full(_)) => "it is more than 1024 lines behind",
            Err(TrySendError::Disconnected(_)) => "it has closed its input",
        };
        tracing::warn!(
            "report_to: `{}` reads no more metrics ({why}); the run goes on without it",
            self.command
        );
        self.lines = None;
    }
}

/// Writes lines until there are no more, or nobody reads them.
fn feed(mut input: ChildStdin, lines: &Receiver<Vec<u8>>) {
    for line in lines {
        if input.write_all(&line).and_then(|()| input.flush()).is_err() {
            return;
        }
    }
}

impl Drop for CommandSink {
    /// Closes the input, and waits for the command to end, but no longer than [`PATIENCE`].
    fn drop(&mut self) {
        self.lines = None;
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
