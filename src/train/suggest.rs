//! Settings that suit a data file and a machine: what `init` writes, and what `train` takes where no file says anything.

use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::Serialize;

use super::memory::{MemoryEstimate, MemoryInputs};
use super::{Prepared, record};
use crate::config::RunConfig;
use crate::data::{BatchOptions, Dataset, Overlong};
use crate::distributed::Communicator;
use crate::hub::{self, HubOptions};
use crate::model::read_shape;
use crate::system::available_memory_bytes;

/// Share of the available memory that the estimate of a suggested run may reach.
const SHARE: f64 = 0.7;
/// Number of tokens that an optimiser step should have at least.
const STEP_TOKENS: usize = 2048;
/// Largest suggested sequence length. A note tells if there are longer examples.
const LONGEST: usize = 4096;

const LENGTH: &str = "data.max_seq_length";
const OVERLONG: &str = "data.overlong";
const PACKING: &str = "data.packing";
const BATCH: &str = "train.per_device_train_batch_size";
const ACCUMULATION: &str = "train.gradient_accumulation_steps";
const CHECKPOINTING: &str = "train.gradient_checkpointing";
const EPOCHS: &str = "train.num_train_epochs";
const STEPS: &str = "train.max_steps";

/// What the user has decided already. The rest of a [`Suggestion`] is made to suit.
#[derive(Debug, Clone, Copy, Default)]
pub struct Decided {
    /// Whether short examples share a pack.
    pub packing: Option<bool>,
    /// Examples, or packs, per batch.
    pub batch_size: Option<usize>,
}

/// Settings that suit the data and the machine.
#[derive(Debug)]
pub struct Suggestion {
    /// Length limit, tokens.
    pub max_seq_length: usize,
    /// How longer examples are treated.
    pub overlong: Overlong,
    /// Whether short examples are packed together.
    pub packing: bool,
    /// Number of examples, or packs, per batch.
    pub batch_size: usize,
    /// Number of batches per optimiser step.
    pub accumulation: usize,
    /// Whether blocks are recomputed in the backward pass.
    pub checkpointing: bool,
    /// Passes over the rows.
    pub epochs: usize,
    /// Notes for the user.
    pub notes: Vec<String>,
}

impl Suggestion {
    /// Suggests settings for a run over the rows of `prepared` on a model with `limit` positions.
    ///
    /// # Errors
    /// As [`Prepared::modules`].
    pub fn new(prepared: &Prepared, limit: usize, decided: Decided) -> Result<Self> {
        let stats = prepared.train.stats();
        // The limit holds for validation rows, too.
        let valid = prepared.valid.as_ref().map(Dataset::stats);
        let n_dropped = stats.n_dropped + valid.map_or(0, |stats| stats.n_dropped);
        let most = valid
            .map_or(0, |stats| stats.tokens.max)
            .max(stats.tokens.max);
        let mut notes = Vec::new();
        if n_dropped > 0 {
            notes.push(format!(
                "{n_dropped} examples are longer than the model's {limit} tokens and will be dropped"
            ));
        }
        let capped = most > LONGEST;
        if capped {
            notes.push(format!(
            "the longest example has {most} tokens; max_seq_length is set to {LONGEST} and longer ones are dropped"
        ));
        }
        // The next multiple of 64, so that slightly longer rows still fit.
        let longest = most.min(LONGEST);
        let longest = longest.next_multiple_of(64).min(limit);
        let tokens = stats.tokens.total as usize;
        let mean = tokens.div_ceil(stats.n_examples.max(1));
        // If most examples are much shorter than the longest, packing makes the sizes of batches more equal.
        let packing = 2 * mean < longest && stats.n_examples >= 16;
        let packing = decided.packing.unwrap_or(packing);
        let sites = prepared.modules()?;
        let row_tokens = if packing { longest } else { mean };
        let wanted = STEP_TOKENS.div_ceil(row_tokens).clamp(1, 16);
        let wanted = (decided.batch_size).unwrap_or(wanted.next_power_of_two());
        let budget = available_memory_bytes().map(|bytes| (bytes as f64 * SHARE) as u64);
        let mut lengths = prepared.train.lengths();
        for length in &mut lengths {
            *length = (*length).min(longest);
        }
        let fits = |batch_size: usize, gradient_checkpointing: bool| {
            let inputs = MemoryInputs {
                batches: BatchOptions {
                    batch_size,
                    pack_tokens: packing.then_some(longest),
                    ..prepared.settings.batches
                },
                gradient_checkpointing,
                ..prepared.inputs(&sites, &lengths)
            };
            budget.is_none_or(|budget| MemoryEstimate::of(&inputs).peak <= budget)
        };
        let mut batch_size = wanted;
        while decided.batch_size.is_none() && batch_size > 1 && !fits(batch_size, false) {
            batch_size /= 2;
        }
        let checkpointing = !fits(batch_size, false);
        if !fits(batch_size, checkpointing) {
            notes.push("by the estimate this will not fit into the available memory; --dry-run tells what to change".to_owned());
        }
        let steps_an_epoch = if packing {
            tokens.div_ceil(longest.saturating_mul(wanted))
        } else {
            stats.n_examples.div_ceil(wanted)
        };
        Ok(Self {
            max_seq_length: longest,
            overlong: if capped || n_dropped > 0 {
                Overlong::Drop
            } else {
                Overlong::Error
            },
            packing,
            batch_size,
            accumulation: wanted / batch_size,
            checkpointing,
            // Up to three epochs for small data, until there are about a hundred steps.
            epochs: 100usize.div_ceil(steps_an_epoch.max(1)).clamp(1, 3),
            notes,
        })
    }
}

impl Suggestion {
    /// The suggested values of the keys that are not `given`, as `--set` takes them.
    ///
    /// Keys that belong together are suggested together: with a batch size or an accumulation given, the other keeps its
    /// default, since its user has a batch in mind; with a length limit given, longer examples stay an error.
    fn settings(&self, given: &[&str]) -> Vec<String> {
        let any = |keys: &[&str]| keys.iter().any(|key| given.contains(key));
        let batch = any(&[BATCH, ACCUMULATION]);
        let all = [
            (LENGTH, toml_text(self.max_seq_length), any(&[LENGTH])),
            (OVERLONG, toml_text(self.overlong), any(&[LENGTH, OVERLONG])),
            (PACKING, toml_text(self.packing), any(&[PACKING])),
            (BATCH, toml_text(self.batch_size), batch),
            (ACCUMULATION, toml_text(self.accumulation), batch),
            (
                CHECKPOINTING,
                toml_text(self.checkpointing),
                any(&[CHECKPOINTING]),
            ),
            (EPOCHS, toml_text(self.epochs), any(&[EPOCHS, STEPS])),
        ];
        let all = all.into_iter().filter(|(_, _, decided)| !decided);
        all.map(|(key, value, _)| format!("{key}={value}"))
            .collect()
    }
}

/// A value as TOML writes it.
pub fn toml_text(value: impl Serialize) -> String {
    // Names of enumerations are text.
    toml::Value::try_from(value).map_or_else(|_| String::new(), |value| value.to_string())
}

/// The configuration of a run that has no file: what `overrides` say, and for the other keys the values that `init` would
/// suggest for the rows and the machine. A run that is resumed keeps the values that its run.json records, because they
/// may depend on the memory that was free. All ranks take what rank 0 finds.
///
/// # Errors
/// As [`RunConfig::from_toml`] and [`Prepared::new`].
pub fn without_file(
    overrides: &[String],
    resumed: Option<&str>,
    ranks: &dyn Communicator,
) -> Result<RunConfig> {
    const SOURCE: &str = "the command line";
    let given: Vec<&str> = overrides
        .iter()
        .filter_map(|entry| Some(entry.split_once('=')?.0.trim()))
        .collect();
    let asked = RunConfig::from_toml("", SOURCE, overrides)?;
    let from = resumed.map(|from| record_of(from, &asked.train.output_dir));
    let earlier = from.and_then(|path| recorded(&path, &given));
    let found = match earlier {
        _ if !ranks.is_first() => (Vec::new(), false),
        Some(settings) => (settings, true),
        None => (suggested(&asked, &given, overrides)?, false),
    };
    let (settings, goes_on) = ranks.of_first(found)?;
    let mut all = settings.clone();
    all.extend(overrides.iter().cloned());
    let run = RunConfig::from_toml("", SOURCE, &all)?;
    if !settings.is_empty() {
        let what = match goes_on {
            true => "of this run",
            false => "chosen for these rows and this machine",
        };
        tracing::info!("{what}: {}", settings.join("  "));
    }
    Ok(run)
}

fn suggested(asked: &RunConfig, given: &[&str], overrides: &[String]) -> Result<Vec<String>> {
    let hub = HubOptions {
        revision: asked.model.revision.clone(),
        token_source: String::new(),
    };
    let base = hub::locate(&asked.model.model_id, &hub)?;
    let positions = read_shape(&base.dir)?.max_position_embeddings;
    // Every row is read as the run reads it, with nothing left out but what the model itself cannot hold.
    let mut probe = Vec::new();
    if !given.contains(&LENGTH) {
        probe.push(format!("{LENGTH}={positions}"));
        probe.push(format!("{OVERLONG}=\"drop\""));
    }
    probe.push(format!("{PACKING}=false"));
    let mut keys = overrides.to_vec();
    keys.extend(probe);
    let mut run = RunConfig::from_toml("", "the command line", &keys)?;
    run.notes.clear();
    let prepared = Prepared::new(run, Some(base))?;
    let limit = match given.contains(&LENGTH) {
        true => asked.data.max_seq_length_for(positions),
        false => positions,
    };
    let decided = Decided {
        packing: given.contains(&PACKING).then_some(asked.data.packing),
        batch_size: (given.contains(&BATCH) || given.contains(&ACCUMULATION))
            .then_some(asked.train.per_device_train_batch_size),
    };
    let suggestion = Suggestion::new(&prepared, limit, decided)?;
    for note in &suggestion.notes {
        tracing::warn!("{note}");
    }
    Ok(suggestion.settings(given))
}

/// The run.json of a run that `--resume` continues: beside the checkpoint that it names, or in the output directory.
pub fn record_of(resume: &str, output_dir: &Path) -> PathBuf {
    let named = Path::new(resume).parent().map(|dir| dir.join("run.json"));
    let named = named.filter(|path| resume != "auto" && path.is_file());
    named.unwrap_or_else(|| output_dir.join("run.json"))
}

/// The values that the run of the run.json at `path` was begun with, of the keys that are suggested and not `given`, and its length.
fn recorded(path: &Path, given: &[&str]) -> Option<Vec<String>> {
    let record = record::read(path)?;
    let keys = [
        LENGTH,
        OVERLONG,
        PACKING,
        BATCH,
        ACCUMULATION,
        CHECKPOINTING,
        EPOCHS,
        STEPS,
    ];
    let value = |key: &str| {
        let value = record["config"].pointer(&format!("/{}", key.replace('.', "/")))?;
        Some(format!("{key}={}", toml::Value::try_from(value).ok()?))
    };
    let length = [EPOCHS, STEPS];
    let has_length = length.iter().any(|key| given.contains(key));
    let decided = |key: &str| given.contains(&key) || has_length && length.contains(&key);
    record["config"].is_object().then(|| {
        let keys = keys.into_iter().filter(|key| !decided(key));
        keys.filter_map(value).collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::test_support::{tiny_llama, write_temp};
    use crate::distributed::Alone;

    /// Rows of which most are short, so that packs are suggested, and the longest decides the limit.
    fn rows() -> (tempfile::TempDir, std::path::PathBuf) {
        let row = |text: &str| format!("{{\"prompt\":\"p\",\"completion\":\"{text}\"}}\n");
        write_temp(&(row("short").repeat(40) + &row(&"long ".repeat(60))))
    }

    #[test]
    fn a_run_without_a_file_has_the_settings_that_init_would_write() {
        let (dir, rows) = rows();
        let keys = |more: &[&str]| -> Vec<String> {
            let model = format!("model.model_id={:?}", tiny_llama());
            let mut keys = vec![model, format!("data.train={rows:?}")];
            keys.push(format!("train.output_dir={:?}", dir.path().join("out")));
            keys.extend(more.iter().map(|key| (*key).to_owned()));
            keys
        };
        let made = |more: &[&str]| without_file(&keys(more), None, &Alone).expect("a run");
        let run = made(&[]);
        assert!(run.data.packing);
        assert_eq!(run.data.max_seq_length.expect("suggested") % 64, 0);
        assert!(run.train.num_train_epochs.expect("suggested") > 1.0);

        // A validation row may be the longest.
        let (_valid_dir, valid) = write_temp(&format!(
            "{{\"prompt\":\"p\",\"completion\":\"{}\"}}\n",
            "longer ".repeat(55)
        ));
        let with_valid = made(&[&format!("data.valid={valid:?}")]);
        assert!(with_valid.data.max_seq_length > run.data.max_seq_length);

        // What is given stays, and what belongs to it is not made up.
        let run = made(&[
            "data.packing=false",
            "train.per_device_train_batch_size=3",
            "train.max_steps=7",
        ]);
        assert!(!run.data.packing);
        assert_eq!(run.train.per_device_train_batch_size, 3);
        assert_eq!(run.train.gradient_accumulation_steps, 1);
        assert_eq!(
            (run.train.max_steps, run.train.num_train_epochs),
            (Some(7), None)
        );
        let short = without_file(&keys(&["data.max_seq_length=32"]), None, &Alone);
        let refused = format!("{:#}", short.expect_err("a row is longer"));
        assert!(refused.contains("max_seq_length"), "{refused}");
    }

    /// What depended on the machine when the run began does not change when it goes on.
    #[test]
    fn a_resumed_run_keeps_its_settings() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = record_of("auto", dir.path());
        assert_eq!(recorded(&path, &[]), None);
        let record = serde_json::json!({"config": {
            "data": {"max_seq_length": 77, "packing": true, "overlong": "drop"},
            "train": {"per_device_train_batch_size": 3, "gradient_checkpointing": true, "num_train_epochs": 2.0},
        }});
        std::fs::write(&path, record.to_string()).expect("written");
        let kept = [
            "data.max_seq_length=77",
            "data.overlong=\"drop\"",
            "train.per_device_train_batch_size=3",
            "train.gradient_checkpointing=true",
        ];
        let found = recorded(&path, &[PACKING, "train.max_steps"]);
        assert_eq!(found.expect("a record"), kept);
        let whole = recorded(&path, &[]).expect("a record");
        assert!(
            whole.contains(&"train.num_train_epochs=2.0".to_owned()),
            "{whole:?}"
        );
        // A checkpoint that is named has its record beside it.
        let checkpoint = dir.path().join("checkpoint-5").display().to_string();
        assert_eq!(record_of(&checkpoint, Path::new("elsewhere")), path);
    }
}
