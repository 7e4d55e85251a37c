//! Shows progress on stderr: a bar on a terminal, plain lines otherwise. Of several ranks, the first shows it.

use std::io::IsTerminal;

use indicatif::{HumanDuration, ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};

use monteclora_adapters::methods::Chart;

use crate::distributed::world;
use crate::train::Event;
use crate::train::metrics::TrainRecord;

/// A bar that counts bytes; invisible if stderr is not a terminal.
pub fn bytes(message: &'static str) -> ProgressBar {
    styled("{msg:18} {bar:24} {bytes}/{total_bytes} {eta}").with_message(message)
}

/// A bar that counts items; invisible if stderr is not a terminal.
pub fn items(message: &'static str, total: u64) -> ProgressBar {
    let bar = styled("{msg:18} {bar:24} {pos}/{len} {eta}").with_message(message);
    bar.set_length(total);
    bar
}

/// A spinner for work without steps to count; invisible if stderr is not a terminal.
pub fn busy(message: &'static str) -> ProgressBar {
    let bar = styled("{spinner} {msg} [{elapsed}]").with_message(message);
    bar.enable_steady_tick(std::time::Duration::from_millis(120));
    bar
}

fn styled(template: &str) -> ProgressBar {
    let target = match world().is_first() {
        true => ProgressDrawTarget::stderr(),
        false => ProgressDrawTarget::hidden(),
    };
    let bar = ProgressBar::with_draw_target(None, target);
    match ProgressStyle::with_template(template) {
        Ok(style) => bar.with_style(style.with_key("eta", eta)),
        Err(_) => bar,
    }
}

/// The time left, once there is something to tell it by.
fn eta(state: &ProgressState, text: &mut dyn std::fmt::Write) {
    if state.pos() > 0 {
        // A bar that cannot be drawn tells nothing.
        let _ = write!(text, "{:#}", HumanDuration(state.eta()));
    }
}

/// Width in columns of the terminal of stderr.
fn columns() -> usize {
    console::Term::stderr().size().1.into()
}

/// Joins the `parts` that fit into a line of `columns`. The first part is always kept.
fn fitting(parts: &[String], columns: usize) -> String {
    let mut line = String::new();
    for part in parts {
        let gap = if line.is_empty() { "" } else { "  " };
        if !line.is_empty() && line.chars().count() + gap.len() + part.chars().count() >= columns {
            continue;
        }
        line.push_str(gap);
        line.push_str(part);
    }
    line
}

/// Shows the progress of a training run.
#[derive(Debug)]
pub struct TrainProgress {
    bar: Option<ProgressBar>,
    first: u64,
    began: std::time::Instant,
    total: u64,
    /// Loss of the last step.
    loss: f64,
    /// Learning rate, speed and memory from the last metrics.
    latest: Vec<String>,
}

impl Default for TrainProgress {
    fn default() -> Self {
        Self {
            bar: std::io::stderr()
                .is_terminal()
                .then(|| styled("training {bar:24} {pos}/{len} [{elapsed}{prefix}] {wide_msg}")),
            first: 0,
            began: std::time::Instant::now(),
            total: 0,
            loss: 0.0,
            latest: Vec::new(),
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
                self.loss = *loss;
                self.say();
                if let Some(bar) = &self.bar {
                    bar.set_position(*step);
                    bar.set_prefix(format!(" < {}", self.eta(*step)));
                    if *step == self.total {
                        bar.finish();
                    }
                }
            }
            Event::Train(record) => {
                self.latest = vec![
                    format!("lr {:.2e}", record.learning_rate),
                    format!("{:.0} tok/s", record.tokens_per_second),
                ];
                if let Some(bytes) = record.peak_memory_bytes {
                    self.latest
                        .push(format!("peak {:.2} GB", bytes as f64 / 1e9));
                }
                self.say();
                let mut parts = vec![format!("step {}/{}", record.step, self.total)];
                parts.extend(losses(record));
                let ranks = record.metrics.iter();
                let ranks = ranks.filter(|(metric, _)| metric.chart == Chart::Rank);
                parts.extend(ranks.map(|(_, rank)| format!("rank {rank:.1}")));
                parts.push(format!("grad {:.3}", record.grad_norm));
                parts.extend(self.latest.iter().cloned());
                if record.step < self.total {
                    parts.push(format!("eta {}", self.eta(record.step)));
                }
                self.line(&parts);
            }
            Event::Eval(record) => self.line(&[
                format!("step {}/{}", record.step, self.total),
                format!("valid loss {:.4}", record.loss),
                format!("perplexity {:.3}", record.perplexity),
                format!("token accuracy {:.3}", record.token_accuracy),
            ]),
            Event::Saved(step) => self.line(&[
                format!("step {step}/{}", self.total),
                "checkpoint written".to_owned(),
            ]),
        }
    }

    /// Shows the loss and the latest metrics beside the bar, as far as they fit.
    fn say(&self) {
        if let Some(bar) = &self.bar {
            // Name, bar, counts and times take about this many columns.
            let count = format!("{0}/{0}", self.total).len();
            let left =
                columns().saturating_sub(9 + 24 + 1 + count + " [00:00:00 < 00:00:00] ".len());
            let mut parts = vec![format!("loss {:.4}", self.loss)];
            parts.extend(self.latest.iter().cloned());
            bar.set_message(fitting(&parts, left));
        }
    }

    /// Logs the whole line. If there is a bar, prints above it only what fits, because metrics.jsonl has everything.
    fn line(&self, parts: &[String]) {
        match &self.bar {
            Some(bar) => bar.println(fitting(parts, columns())),
            None => tracing::info!("{}", parts.join("  ")),
        }
    }

    fn eta(&self, step: u64) -> String {
        let done = step.saturating_sub(self.first).max(1) as f64;
        let to_do = self.total.saturating_sub(step) as f64;
        let left = (self.began.elapsed().as_secs_f64() * to_do / done).ceil() as u64;
        format!("{:02}:{:02}:{:02}", left / 3600, left / 60 % 60, left % 60)
    }
}

/// The task's loss, which is comparable with the validation loss. If other terms are added to it, also the terms and
/// the total.
fn losses(record: &TrainRecord) -> Vec<String> {
    let loss = format!("loss {:.4}", record.task_loss);
    let parts = record.metrics.iter();
    let parts: Vec<(&str, f64)> = parts
        .filter_map(|(metric, value)| Some((metric.in_loss?, *value)))
        .collect();
    if parts.iter().all(|(_, value)| *value == 0.0) {
        return vec![loss];
    }
    let mut text = String::new();
    for (idx, (name, value)) in parts.into_iter().enumerate() {
        if idx == 0 || value > 0.0 {
            text.push_str(&format!("+ {name} {value:.4} "));
        }
    }
    vec![loss, format!("({text}= {:.4})", record.loss)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_keeps_to_the_terminal() {
        let parts = ["step 1/9", "loss 0.5", "lr 1e-3"].map(str::to_owned);
        assert_eq!(fitting(&parts, 80), "step 1/9  loss 0.5  lr 1e-3");
        assert_eq!(fitting(&parts, 27), "step 1/9  loss 0.5");
        assert_eq!(fitting(&parts, 28), "step 1/9  loss 0.5  lr 1e-3");
        assert_eq!(fitting(&parts, 18), "step 1/9  lr 1e-3");
        assert_eq!(fitting(&parts, 1), "step 1/9");
    }
}
