//! The plan of a run: its steps and its memory, known before the base model is loaded.

use anyhow::Result;
use monteclora_adapters::methods::{Group, Module, Parameter};
use monteclora_adapters::weights::{BF16, Kind};
use monteclora_converters::Tensor;
use serde::Serialize;

use super::memory::{MemoryEstimate, MemoryInputs, program_bytes};
use super::{Prepared, modules};
use crate::data::{Batches, Cursor, Dataset, Stats};
use crate::model::{bytes_held, held_bytes};
use crate::system::available_memory_bytes;

/// Least sequence length and least rank that the advice contains.
const MIN_LENGTH: usize = 64;
const MIN_RANK: usize = 4;

/// A change that lowers the memory of a run, with the resulting estimate.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Advice {
    /// The keys to set, in the form of `--set`.
    pub set: Vec<String>,
    /// The estimate with this change and all earlier ones.
    pub memory_estimate_bytes: u64,
}

/// The report of `train --dry-run`.
#[derive(Debug, Serialize)]
pub struct Plan<'a> {
    /// The adapted modules.
    pub sites: &'a [String],
    /// Number of trained values.
    pub trainable_parameters: usize,
    /// Optimiser steps of the whole run.
    pub total_steps: u64,
    /// Optimiser steps of one epoch.
    pub steps_per_epoch: usize,
    /// Training rows.
    pub train: &'a Stats,
    /// Validation rows.
    pub valid: Option<&'a Stats>,
    /// The estimated peak: `peak` of `memory`.
    pub memory_estimate_bytes: u64,
    /// The estimate by purpose.
    pub memory: MemoryEstimate,
    /// Available memory of the machine, if the system reports it. `None` for another device than the CPU, whose memory is
    /// not read.
    pub available_memory_bytes: Option<u64>,
    /// Changes to make if the available memory is not enough.
    pub advice: Vec<Advice>,
}

impl Prepared {
    /// The plan of the run.
    ///
    /// # Errors
    /// As [`Self::modules`].
    pub fn plan(&self) -> Result<Plan<'_>> {
        let sites = self.modules()?;
        let memory = self.estimate(&sites);
        let available = available_memory_bytes().filter(|_| self.on_cpu);
        let advice = match available {
            Some(available) if memory.peak > available => self.advice(&sites, available),
            _ => Vec::new(),
        };
        let mut parameters = self.method.shared(&sites);
        for module in &sites {
            parameters.extend(self.method.parameters(module));
        }
        let batches = Batches::new(&self.train, self.settings.batches, Cursor::default());
        Ok(Plan {
            sites: &self.sites,
            trainable_parameters: (parameters.iter())
                .filter(|parameter| parameter.group != Group::State)
                .map(Parameter::n_values)
                .sum(),
            total_steps: self.total_steps,
            steps_per_epoch: (batches.n_batches()).div_ceil(self.settings.micro_batches),
            train: self.train.stats(),
            valid: self.valid.as_ref().map(Dataset::stats),
            memory_estimate_bytes: memory.peak,
            memory,
            available_memory_bytes: available,
            advice,
        })
    }

    /// The adapted modules.
    ///
    /// # Errors
    /// Returns an error if a pattern is not a valid regular expression.
    pub fn modules(&self) -> Result<Vec<Module>> {
        let modules = modules(&self.adapter_config, &self.sites, &self.model_config)?;
        Ok(modules.into_iter().map(|(_, module)| module).collect())
    }

    /// Everything that determines the memory of the run, for these sites and lengths.
    pub(super) fn inputs<'a>(
        &'a self,
        sites: &'a [Module],
        lengths: &'a [usize],
    ) -> MemoryInputs<'a> {
        self.inputs_as(self.weights, sites, lengths)
    }

    /// [`Self::inputs`], with the base's weights held as `weights`.
    fn inputs_as<'a>(
        &'a self,
        weights: &Kind,
        sites: &'a [Module],
        lengths: &'a [usize],
    ) -> MemoryInputs<'a> {
        let stats = self.train.stats();
        MemoryInputs {
            model: &self.model_config,
            weights: held_bytes(&self.files, weights),
            base_bytes: self.mapped_bytes(weights),
            sites,
            method: self.method.as_ref(),
            lengths,
            trained_share: stats.trained_tokens.total as f64 / stats.tokens.total.max(1) as f64,
            batches: self.settings.batches,
            dropout: self.settings.lora_dropout > 0.0,
            gradient_checkpointing: self.settings.train.gradient_checkpointing,
            program: program_bytes(),
            on_cpu: self.on_cpu,
        }
    }

    /// Bytes of the base model's files that are mapped only while the weights are read. Quantised blocks that stay
    /// mapped are counted with the weights.
    fn mapped_bytes(&self, weights: &Kind) -> u64 {
        let names = self.files.names();
        let tensors = names.filter_map(|name| self.files.get(name));
        let stored = |tensor: &Tensor| tensor.stored_bytes() as u64;
        let copied = tensors.filter(|tensor| {
            tensor.blocks().is_none() || bytes_held(tensor, weights) != stored(tensor)
        });
        copied.map(|tensor| stored(&tensor)).sum()
    }

    /// Estimates the memory of the run.
    pub fn estimate(&self, sites: &[Module]) -> MemoryEstimate {
        MemoryEstimate::of(&self.inputs(sites, &self.train.lengths()))
    }

    /// Logs that the run will probably not fit into memory, with what `--dry-run` would say of it.
    ///
    /// # Errors
    /// As [`Self::modules`].
    pub fn warn_of_memory(&self) -> Result<()> {
        let plan = self.plan()?;
        let Some(available) = plan.available_memory_bytes else {
            return Ok(());
        };
        if plan.memory_estimate_bytes > available {
            let gb = |bytes: u64| bytes as f64 / 1e9;
            tracing::warn!(
                "by the estimate this run needs {:.2} GB and {:.2} GB are available; --dry-run tells what to change",
                gb(plan.memory_estimate_bytes),
                gb(available)
            );
        }
        Ok(())
    }

    /// The changes that make the run fit into `available` bytes, in this order: a smaller batch with correspondingly
    /// more accumulation, checkpointing, float32 weights held in bfloat16, shorter sequences, a smaller rank. Each change
    /// adds to the earlier ones. The list ends with the change that is enough.
    pub fn advice(&self, sites: &[Module], available: u64) -> Vec<Advice> {
        let settings = &self.settings.train;
        let (mut sites, mut lengths) = (sites.to_vec(), self.train.lengths());
        let mut batches = self.settings.batches;
        let mut checkpointing = settings.gradient_checkpointing;
        let mut weights = self.weights;
        let mut lowest = self.estimate(&sites).peak;
        let mut advice = Vec::new();
        for kind in 0..5 {
            let mut set = Vec::new();
            // Halve until the run fits or the value is at its least.
            while lowest > available {
                match kind {
                    0 if batches.batch_size > 1 => {
                        batches.batch_size /= 2;
                        let accumulation = (settings.per_device_train_batch_size
                            * settings.gradient_accumulation_steps)
                            .div_ceil(batches.batch_size);
                        set = vec![
                            format!("train.per_device_train_batch_size={}", batches.batch_size),
                            format!("train.gradient_accumulation_steps={accumulation}"),
                        ];
                    }
                    1 if !checkpointing => {
                        checkpointing = true;
                        set = vec!["train.gradient_checkpointing=true".to_owned()];
                    }
                    2 if held_bytes(&self.files, &BF16) < held_bytes(&self.files, weights) => {
                        weights = &BF16;
                        set = vec![format!("model.dtype={}", BF16.name)];
                    }
                    3 => {
                        let longest = lengths.iter().copied().max().unwrap_or(0);
                        let limit = batches.pack_tokens.unwrap_or(longest) / 2;
                        if limit < MIN_LENGTH {
                            break;
                        }
                        for length in &mut lengths {
                            *length = (*length).min(limit);
                        }
                        batches.pack_tokens = batches.pack_tokens.map(|_| limit);
                        set = vec![format!("data.max_seq_length={limit}")];
                        if longest > limit {
                            set.push("data.overlong=truncate".to_owned());
                        }
                    }
                    4 if sites.iter().any(|site| site.rank > MIN_RANK) => {
                        for site in &mut sites {
                            site.rank = (site.rank / 2).max(MIN_RANK);
                        }
                        let rank = sites.iter().map(|site| site.rank).max();
                        let rank = rank.unwrap_or(MIN_RANK);
                        set = vec![format!("lora.r={rank}")];
                    }
                    _ => break,
                }
                let changed = MemoryInputs {
                    batches,
                    gradient_checkpointing: checkpointing,
                    ..self.inputs_as(weights, &sites, &lengths)
                };
                lowest = MemoryEstimate::of(&changed).peak;
            }
            if !set.is_empty() {
                advice.push(Advice {
                    set,
                    memory_estimate_bytes: lowest,
                });
            }
        }
        advice
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::RunConfig;
    use crate::data::test_support::{tiny_llama, write_temp};

    #[test]
    fn advice_comes_in_order_and_reaches_its_aim() {
        let row = r#"{"prompt":"what is red","completion":"a rose, a cherry, a tomato, a brick, a fire engine and a stop sign, all of them"}"#;
        let (dir, rows) = write_temp(&format!("{row}\n").repeat(64));
        let text = format!(
            "[model]\nmodel_id = {:?}\n[data]\ntrain = {rows:?}\n[train]\noutput_dir = {:?}\nper_device_train_batch_size = 4\n",
            tiny_llama(),
            dir.path().join("out")
        );
        let run = RunConfig::from_toml(&text, "run.toml", &[]).expect("resolves");
        let prepared = Prepared::new(run, None).expect("prepares");
        let sites = prepared.modules().expect("ranks");
        let peak = prepared.estimate(&sites).peak;
        assert_eq!(prepared.advice(&sites, peak), []);

        // For slightly less memory a smaller batch is enough, and the effective batch size stays the same.
        let little = prepared.advice(&sites, peak - 1);
        assert_eq!(
            little[0].set,
            [
                "train.per_device_train_batch_size=2",
                "train.gradient_accumulation_steps=2"
            ]
        );
        assert_eq!(little.len(), 1);
        assert!(little[0].memory_estimate_bytes < peak);

        // If the memory can never be enough, the advice lists all changes, and no estimate is above the one before.
        let all = prepared.advice(&sites, 1);
        let keys: Vec<&str> = all
            .iter()
            .map(|change| change.set[0].split('=').next().unwrap_or_default())
            .collect();
        assert_eq!(
            keys,
            [
                "train.per_device_train_batch_size",
                "train.gradient_checkpointing",
                "model.dtype",
                "data.max_seq_length",
                "lora.r"
            ]
        );
        assert!(all.is_sorted_by(|a, b| a.memory_estimate_bytes >= b.memory_estimate_bytes));
    }
}
