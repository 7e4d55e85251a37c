//! What each runtime refuses in an adapter, or gets silently wrong, and the remedy.

use std::path::Path;

use serde_json::Value;

use crate::adapter::Adapter;
use crate::beside::Beside;
use crate::config::{PeftType, TargetModules};
use crate::error::{Error, Result};
use crate::formats::peft::read as peft_read;
use crate::formats::{Format, format_named, read_without_base};
use crate::inspect::no_effect;
use crate::json;
use crate::model_files::ModelFiles;
use crate::module_path::{base_of, one_for_all};
use crate::problem::Problem;
use crate::source::Source;
use crate::targets::OUTPUT_HEAD;
use crate::tensors::dtype::DType;
use crate::trained_base::base_warnings;
use crate::validate::runtime::Runtime;

pub(crate) mod cautions;
mod check;
pub(crate) mod runtime;
mod unreadable;

const EXPORT: &str = "monteclora collapse writes the posterior mean as plain LoRA: one rank, one alpha, a list of modules";

/// Every problem of the adapter at `path`, a directory or a GGUF LoRA: what is not understood, and if all is, what
/// [`validate`] finds and what the files' own form (shards, names of tensors) keeps a runtime from reading.
///
/// # Errors
/// As [`Adapter::read`], but for what is refused, which is the result.
///
/// ```
/// use monteclora_converters::{Runtime, validate_path};
///
/// let dir = tempfile::tempdir().expect("a temporary directory");
/// std::fs::write(
///     dir.path().join("adapter_config.json"),
///     r#"{"peft_type": "LORA", "target_modules": ["q_proj"], "lora_bias": true}"#,
/// ).expect("writable");
/// std::fs::write(dir.path().join("adapter_model.bin"), b"a pickle").expect("writable");
/// let problems = validate_path(dir.path(), None, &[Runtime::Vllm])?;
/// let codes: Vec<&str> = problems.iter().map(|problem| problem.code).collect();
/// assert_eq!(codes, ["bias", "pickle", "bias"]);
/// assert!(problems[2].message.starts_with("vllm refuses the adapter"));
/// # Ok::<(), monteclora_converters::Error>(())
/// ```
pub fn validate_path(
    path: &Path,
    base: Option<&ModelFiles>,
    runtimes: &[Runtime],
) -> Result<Vec<Problem>> {
    Ok(examine(path, base, runtimes)?.problems)
}

/// What is wrong with an adapter, and what is to be known of one that can be used.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Findings {
    /// What keeps it from being used.
    pub problems: Vec<Problem>,
    /// What it depends on, what of it is left out, and where it was trained.
    pub warnings: Vec<Problem>,
    /// What lies beside it, where the directory can be listed.
    pub beside: Beside,
}

/// As [`validate_path`], with warnings: what reading left out, names that only some kinds of base have, another base than the one that
/// it was trained on.
///
/// # Errors
/// As [`validate_path`], or if the base cannot be read.
pub fn examine(path: &Path, base: Option<&ModelFiles>, runtimes: &[Runtime]) -> Result<Findings> {
    let read = match base {
        Some(base) => Adapter::read_on(path, base),
        None => read_without_base(path),
    };
    let mut findings = Findings {
        beside: Beside::of(path).unwrap_or_default(),
        ..Findings::default()
    };
    let Findings {
        problems,
        warnings,
        beside,
    } = &mut findings;
    match read {
        Ok(adapter) => {
            *problems = validate(&adapter, base, runtimes)?;
            if has_peft_settings(&adapter) {
                check_form(path, runtimes, problems)?;
            }
            if let Some(base) = base {
                problems.extend(beside.carried.beyond(base));
            }
            *warnings = cautions::of(&adapter, base.is_some(), runtimes);
            warnings.extend(beside.carried.unread_tokens());
            // Only an adapter that fits is worth asking which base it belongs to.
            if let Some(base) = base.filter(|_| problems.is_empty()) {
                warnings.extend(base_warnings(path, &adapter, base)?);
            }
        }
        // A file that cannot be opened is the adapter's problem as much as one in it.
        Err(Error::Problem(problem)) if problem.exit == 4 => problems.push(problem),
        Err(error) if !error.problems().is_empty() => {
            let found = error.problems();
            problems.extend_from_slice(found);
            let of_runtimes = runtimes.iter();
            problems.extend(of_runtimes.flat_map(|runtime| unreadable::fates(found, *runtime)));
        }
        Err(error) => return Err(error),
    }
    Ok(findings)
}

/// Every problem of a readable adapter: no effect, misfit with `base`, and what each runtime refuses or gets wrong.
///
/// # Errors
/// If a factor is not of a float type or a pattern of the configuration cannot be used.
pub fn validate(
    adapter: &Adapter,
    base: Option<&ModelFiles>,
    runtimes: &[Runtime],
) -> Result<Vec<Problem>> {
    let mut problems = Vec::new();
    if !adapter.has_effect()? {
        problems.push(no_effect());
    }
    match base {
        Some(base) => problems.extend(adapter.check_against(base)?),
        None => problems.extend(cautions::of_no_model(adapter)),
    }
    for runtime in runtimes {
        let mut report = Report {
            runtime: *runtime,
            merge_only: adapter.sites.iter().any(|site| site.beyond.is_some()),
            problems: &mut problems,
        };
        check_rank(adapter, &mut report);
        if let Some(format) = format_named(adapter.format)
            && !format.about().runtimes.contains(runtime)
        {
            report.unread_format(adapter.format, format);
            continue;
        }
        if has_peft_settings(adapter) {
            check_config(adapter, &mut report)?;
        }
        check_sites(adapter, base, &mut report);
        if base.is_none() {
            check_front(adapter, &mut report);
        }
        if *runtime == Runtime::Mlx {
            let message = "keeps the experts of a layer in one module (switch_mlp), and would not load one expert as a module of its own";
            let fix = cautions::EXPERTS_FOR_MLX;
            let found = one_for_all("experts", &cautions::experts(adapter), "", fix);
            if let Some(found) = found {
                report.add(found.code, &found.at, message, &found.fix);
            }
        }
        if let (Runtime::Mistralrs, Some(base)) = (*runtime, base) {
            check_coverage(adapter, base, &mut report);
        }
    }
    Ok(problems)
}

struct Report<'a> {
    runtime: Runtime,
    /// Whether the update of a module is no plain LoRA.
    merge_only: bool,
    problems: &'a mut Vec<Problem>,
}

impl Report<'_> {
    fn add(&mut self, code: &'static str, location: &str, message: &str, fix: &str) {
        // Neither collapsing nor converting helps an update that is no plain LoRA.
        let mut verbs = ["collapse", "convert"].iter();
        let writes_lora = verbs.any(|verb| fix.contains(&format!("monteclora {verb}")));
        let fix = if self.merge_only && writes_lora {
            MERGE
        } else {
            fix
        };
        self.problems.push(Problem::new(
            code,
            location,
            format!("{} {message}", self.runtime),
            fix,
        ));
    }

    /// The runtime does not read the format at all.
    fn unread_format(&mut self, name: &str, format: &dyn Format) {
        let label = format.about().label;
        let message = match label.strip_suffix('y') {
            Some(stem) => format!("does not read {stem}ies"),
            None => format!("does not read {label}s"),
        };
        let fix = match self.runtime {
            Runtime::LlamaCpp => "convert it: monteclora convert --to gguf",
            Runtime::Mlx => "convert it: monteclora convert --to mlx",
            _ => "convert it: monteclora convert --to lora",
        };
        self.add("format", name, &message, fix);
    }
}

fn has_peft_settings(adapter: &Adapter) -> bool {
    format_named(adapter.format).is_some_and(|format| format.about().has_peft_settings)
}

/// Ranks above what a runtime takes without being told otherwise, or at all.
fn check_rank(adapter: &Adapter, report: &mut Report<'_>) {
    /// vLLM's choices for `--max-lora-rank`; the default is 16.
    const VLLM_RANKS: [usize; 7] = [16, 32, 64, 128, 256, 320, 512];
    let Some(site) = adapter.sites.iter().max_by_key(|site| site.rank) else {
        return;
    };
    let rank = site.rank;
    let (most, fix) = match report.runtime {
        Runtime::Vllm if rank > VLLM_RANKS[0] => {
            match VLLM_RANKS.iter().find(|choice| rank <= **choice) {
                Some(choice) => (
                    "16 by default",
                    &*format!("start vLLM with --max-lora-rank {choice}"),
                ),
                None => (
                    "512",
                    "merge the adapter into the base, or train with a lower rank",
                ),
            }
        }
        Runtime::Mistralrs09 if rank > 256 => (
            "256 by default",
            "raise lora_max_rank, or train with a lower rank",
        ),
        _ => return,
    };
    let message = format!("takes ranks up to {most}; this is {rank}");
    report.add("rank-limit", "r", &message, fix);
}

/// Settings that a runtime refuses or leaves unread: the key, the code, where, the runtimes, and what they do. Those that
/// are not named read every form, or go by the tensors; up to 0.8 mistral.rs leaves unknown keys and tensors unread, which
/// leaves the posterior mean. llama.cpp and later mistral.rs take alpha over each site's own rank, as PEFT does.
const SETTINGS: &str = "\
monteclora_config | monteclora | monteclora_config | mistralrs-0.9 | refuses it, and the sampler's tensors too
monteclora_config | monteclora | adapter_model.safetensors | vllm | refuses the sampler's tensors
monteclora_config | monteclora | adapter_model.safetensors | llamacpp | converts nothing: its script stops at the sampler's tensors
adalora | adalora | peft_type | mistralrs mistralrs-0.9 vllm llamacpp | reads no AdaLoRA
dora | dora | use_dora | mistralrs | leaves the magnitudes unread, so the update would silently be another
dora | dora | use_dora | mistralrs-0.9 vllm llamacpp | reads no DoRA
beyond | merge-only | peft_type | mistralrs mistralrs-0.9 vllm llamacpp peft | does not know this type
use_rslora | rslora | use_rslora | mistralrs llamacpp | leaves it unread, so the update would silently have the wrong scale
alpha_pattern | alpha-pattern | alpha_pattern | mistralrs llamacpp | leaves it unread, so the update would silently have the wrong scale
alpha_pattern | alpha-pattern | alpha_pattern | vllm | leaves it unread in most released versions, so the update would silently have the wrong scale
rank_pattern | rank-pattern | rank_pattern | mistralrs | leaves it unread, so sites of another rank fail to load
rank_pattern | rank-pattern | rank_pattern | vllm | leaves it unread in most released versions, so sites of another rank would silently have the wrong scale
target_modules | target-modules-form | target_modules | mistralrs | reads only a list of names
layers_to_transform | target-modules-form | layers_to_transform | mistralrs | leaves it unread, so modules without tensors fail to load
exclude_modules | target-modules-form | exclude_modules | mistralrs | leaves it unread, so modules without tensors fail to load";

/// The remedy for AdaLoRA's form.
const COLLAPSE_ADALORA: &str = "monteclora collapse ADAPTER -o DIR multiplies the singular values into A: a plain LoRA with the same update";

/// The remedy for an update that no plain LoRA expresses.
const MERGE: &str = "merge it into its base: monteclora merge -m BASE -a ADAPTER -o DIR";

/// Looks every setting in use up in [`SETTINGS`].
fn check_config(adapter: &Adapter, report: &mut Report<'_>) -> Result<()> {
    let config = &adapter.config;
    let names: Vec<&str> = adapter
        .sites
        .iter()
        .map(|site| site.name.as_str())
        .collect();
    let without_effect = config.tables_without_effect(&names)?;
    let mut in_use = config.resolved_keys();
    in_use.retain(|key| !without_effect.contains(key));
    in_use.extend(config.monteclora.as_ref().map(|_| "monteclora_config"));
    in_use.extend(match config.peft_type {
        PeftType::AdaLora => Some("adalora"),
        PeftType::Ssf | PeftType::Sparse => Some("beyond"),
        PeftType::Lora => config.use_dora.then_some("dora"),
    });
    let runtime = report.runtime.to_string();
    for row in SETTINGS.lines() {
        let columns: Vec<&str> = row.split(" | ").collect();
        if let [key, code, at, runtimes, message] = columns[..]
            && in_use.contains(&key)
            && runtimes.split(' ').any(|named| named == runtime)
        {
            let fix = match key {
                "adalora" => COLLAPSE_ADALORA,
                _ => EXPORT,
            };
            report.add(code, at, message, fix);
        }
    }
    Ok(())
}

/// The head, and element types.
fn check_sites(adapter: &Adapter, base: Option<&ModelFiles>, report: &mut Report<'_>) {
    let is_tied = base.map(ModelFiles::ties_embeddings);
    for site in &adapter.sites {
        let head = match (report.runtime, is_tied) {
            _ if site.name != OUTPUT_HEAD => None,
            (Runtime::Mistralrs | Runtime::LlamaCpp | Runtime::Mlx, Some(false))
            | (Runtime::Peft, _) => None,
            (Runtime::Mistralrs | Runtime::Mlx, _) => {
                Some("silently leaves the head unadapted where it is tied to the embedding")
            }
            (Runtime::Mistralrs09, _) => Some("refuses LoRA on the head"),
            (Runtime::Vllm, _) => Some("does not apply LoRA on the head in every version"),
            (Runtime::LlamaCpp, _) => {
                Some("has no head to adapt where it is tied to the embedding, and fails to load")
            }
        };
        if let Some(message) = head {
            let fix = "merge the adapter into the base, or train without lm_head";
            report.add("lm-head", &site.name, message, fix);
        }
        let types = [site.lora_a.dtype(), site.lora_b.dtype()];
        let fails = matches!(
            report.runtime,
            Runtime::Mistralrs | Runtime::Mistralrs09 | Runtime::Mlx
        );
        if types.contains(&DType::F64) && fails {
            let fix = "monteclora collapse turns float64 into float32";
            report.add("dtype", &site.name, "fails to load float64", fix);
        }
    }
}

/// mistral.rs finds modules of causal language models alone.
fn check_front(adapter: &Adapter, report: &mut Report<'_>) {
    let is_causal_only = matches!(report.runtime, Runtime::Mistralrs | Runtime::Mistralrs09);
    let named_otherwise = adapter
        .sites
        .iter()
        .find(|site| base_of(&site.name).is_some());
    if let (true, Some(site)) = (is_causal_only, named_otherwise) {
        let message = "finds no module of this name in a causal language model";
        let fix = "train on the causal language model that is served";
        report.add("unknown-site", &site.name, message, fix);
    }
}

/// [`Runtime::Mistralrs`] matches names anywhere in a path and demands tensors for every hit.
fn check_coverage(adapter: &Adapter, base: &ModelFiles, report: &mut Report<'_>) {
    let TargetModules::List(names) = &adapter.config.target_modules else {
        return;
    };
    for module in base.linear_modules() {
        let is_hit = names.iter().any(|name| module.name.contains(name.as_str()));
        let is_site = adapter.sites.iter().any(|site| site.name == module.name);
        if is_hit && !is_site && module.name != OUTPUT_HEAD {
            let message = "looks for target_modules anywhere in a path and finds them here, where there are no tensors: it fails to load";
            report.add("uncovered-target", &module.name, message, EXPORT);
        }
    }
}

/// What is in the files of a PEFT directory but no longer in an [`Adapter`]: shards, the adapter's name within the
/// tensors' names, targets that are left to the reader.
fn check_form(path: &Path, runtimes: &[Runtime], problems: &mut Vec<Problem>) -> Result<()> {
    let source = Source::of(path)?;
    let weights = source.open_weights(peft_read::WEIGHTS_STEM)?;
    let other_name = weights
        .paths
        .iter()
        .filter_map(|path| path.file_name())
        .find(|name| *name != std::ffi::OsStr::new(peft_read::WEIGHTS_FILE));
    // `lora_A.<name>.weight`, where it should be `lora_A.weight`.
    let named: Vec<&str> = weights
        .names()
        .filter(|name| {
            [".lora_A.", ".lora_B."].iter().any(|marker| {
                name.rsplit_once(marker)
                    .is_some_and(|(_, rest)| rest != "weight")
            })
        })
        .collect();
    // Whole weights: copies of the base's, or the adapter would not have been read.
    let whole: Vec<&str> = weights
        .names()
        .filter(|name| !name.contains(".lora_"))
        .collect();
    let keys = json::read_object(&source.dir.join(peft_read::CONFIG_FILE))?;
    let targets = keys.get("target_modules");
    for runtime in runtimes {
        let mut report = Report {
            runtime: *runtime,
            merge_only: false,
            problems,
        };
        if let Some(name) = other_name {
            let message = "looks for one adapter_model.safetensors only";
            let fix = "monteclora collapse writes one file";
            let (code, at) = match &source.named {
                None => ("sharded", "adapter_model-*.safetensors".into()),
                Some(_) => ("file-name", name.to_string_lossy()),
            };
            report.add(code, &at, message, fix);
        }
        if let (Some(first), true) = (
            whole.first(),
            unreadable::refuses("stored-weight", *runtime),
        ) {
            let message =
                "refuses a tensor that is neither A nor B, also where it is a copy of the base's";
            let fix = "monteclora convert ADAPTER -o DIR --to lora -m BASE leaves it out";
            report.add("stored-weight", first, message, fix);
        }
        let is_unread = |name: &&&str| match runtime {
            Runtime::Mistralrs09 => false,
            // PEFT gives every adapter that it loads this name unless told otherwise.
            Runtime::Peft => !name.ends_with(".default.weight"),
            _ => true,
        };
        if let Some(first) = named.iter().find(is_unread) {
            let mut message = match runtime {
                Runtime::Peft => {
                    "does not find a tensor whose name holds the adapter's: it would have no effect"
                }
                _ => "does not recognise a tensor whose name holds the adapter's",
            }
            .to_owned();
            let n_others = named.iter().filter(is_unread).count() - 1;
            if n_others > 0 {
                message += &format!(" (and {n_others} more)");
            }
            report.add(
                "adapter-name",
                first,
                &message,
                "monteclora collapse drops the name",
            );
        }
        let message = match (runtime, targets) {
            (Runtime::Mistralrs | Runtime::Mistralrs09, None | Some(Value::Null)) => {
                "cannot read null"
            }
            (Runtime::Vllm, None) => "refuses a configuration without this key",
            _ => continue,
        };
        report.add("target-modules-form", "target_modules", message, EXPORT);
    }
    Ok(())
}

#[cfg(test)]
mod tests;
