//! Progress on stderr: a bar on a terminal, plain lines otherwise.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::train::Event;
use crate::train::metrics::TrainRecord;

/// A bar of bytes; invisible where stderr is no terminal.
pub fn bytes(message: &'static str) -> ProgressBar {
    styled("{msg} {wide_bar} {bytes}/{total_bytes} {eta}").with_message(message)
}

/// A bar of items; invisible where stderr is no terminal.
pub fn items(message: &'static str, total: u64) -> ProgressBar {
    let bar = styled("{msg} {wide_bar} {pos}/{len} {eta}").with_message(message);
    bar.set_length(total);
    bar
}

fn styled(template: &str) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    match ProgressStyle::with_template(template) {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

/// Shows a training run.
#[derive(Debug)]
pub struct TrainProgress {
    bar: Option<ProgressBar>,
    first: u64,
    began: std::time::Instant,
    total: u64,
    /// What the last line of metrics said of rate, speed and memory.
    latest: String,
}

impl Default for TrainProgress {
    fn default() -> Self {
        Self {
            bar: std::io::stderr()
                .is_terminal()
                .then(|| styled("{msg} {wide_bar} {pos}/{len} [{elapsed} < {eta}]")),
            first: 0,
            began: std::time::Instant::now(),
            total: 0,
            latest: String::new(),
        }
    }
}

impl TrainProgress {
    /// Shows one event.
    pub fn show(&mut self, event: &Event) {
        match event {
            Event::Started(step, total) => {
                (self.first, self.total, self.began) = (*step, *total, std::time::Instant::now());
                if let Some(bar) = &self.bar {
                    bar.set_length(*total);
                    bar.set_position(*step);
                    bar.reset_eta();
                }
            }
            Event::Step(step, loss) => {
                if let Some(bar) = &self.bar {
                    bar.set_position(*step);
                    bar.set_message(format!("loss {loss:.4}{}", self.latest));
                    if *step == self.total {
                        bar.finish();
                    }
                }
            }
            Event::Train(record) => {
                let memory = record.peak_memory_bytes.map_or(String::new(), |bytes| {
                    format!("  peak {:.2} GB", bytes as f64 / 1e9)
                });
                self.latest = format!(
                    "  lr {:.2e}  {:.0} tok/s{memory}",
                    record.learning_rate, record.tokens_per_second
                );
                self.line(format!(
                    "step {}/{}  {}  grad {:.3}{}  eta {}",
                    record.step,
                    self.total,
                    losses(record),
                    record.grad_norm,
                    self.latest,
                    self.eta(record.step)
                ));
            }
            Event::Eval(record) => self.line(format!(
                "step {}/{}  valid loss {:.4}  perplexity {:.3}  token accuracy {:.3}",
                record.step, self.total, record.loss, record.perplexity, record.token_accuracy
            )),
            Event::Saved(step) => {
                self.line(format!("step {step}/{}  checkpoint written", self.total))
            }
        }
    }

    fn line(&self, text: String) {
        match &self.bar {
            Some(bar) => bar.println(text),
            None => tracing::info!("{text}"),
        }
    }

    fn eta(&self, step: u64) -> String {
        let done = step.saturating_sub(self.first).max(1) as f64;
        let to_do = self.total.saturating_sub(step) as f64;
        let left = (self.began.elapsed().as_secs_f64() * to_do / done) as u64;
        format!("{:02}:{:02}:{:02}", left / 3600, left / 60 % 60, left % 60)
    }
}

/// The loss and what it is made of; plain LoRA has the task alone.
fn losses(record: &TrainRecord) -> String {
    if record.kl_loss == 0.0 && record.entropy_loss == 0.0 {
        return format!("loss {:.4}", record.loss);
    }
    let mut text = format!(
        "loss {:.4} = task {:.4} + kl {:.4}",
        record.loss, record.task_loss, record.kl_loss
    );
    if record.entropy_loss > 0.0 {
        text.push_str(&format!(" + mixture {:.4}", record.entropy_loss));
    }
    text
}
