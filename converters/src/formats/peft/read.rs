//! Reads a PEFT directory: every tensor is assigned its role or becomes a problem.

use std::collections::{BTreeMap, BTreeSet};

use rayon::prelude::*;
use serde_json::Value;

use super::config_read;
use super::names::{Parts, Role, SAMPLER, check_names, sort_tensors};
use super::stored::Whole;
use crate::absent;
use crate::adapter::{Adapter, Site, SitePosterior, Triplets};
use crate::beyond::{Beyond, places};
use crate::config::{AdapterConfig, PeftType};
use crate::error::{Error, Result};
use crate::formats::ReadOptions;
use crate::json;
use crate::problem::Problem;
use crate::site_pattern::SitePatterns;
use crate::source::Source;
use crate::targets::Matcher;
use crate::tensors::shards::ShardSet;
use crate::tensors::tensor::Tensor;

/// File names of a PEFT directory.
pub(crate) const CONFIG_FILE: &str = "adapter_config.json";
pub(crate) const WEIGHTS_FILE: &str = "adapter_model.safetensors";
pub(crate) const WEIGHTS_STEM: &str = "adapter_model";
/// PEFT's prefix of a module's path.
pub(crate) const PREFIX: &str = "base_model.model.";
const TAKE_THE_MEAN: &str = "save the adapter again with its posterior, or use its mean: monteclora convert ADAPTER -o DIR --from lora --to lora takes it alone";
pub(super) const SAVE_AGAIN: &str = "save the adapter again";

/// Reads the files of `source`. Without `with_posterior`, the sampler is ignored.
pub(crate) fn read_source(
    source: &Source,
    options: &ReadOptions<'_>,
    with_posterior: bool,
) -> Result<Adapter> {
    let dir = source.dir.as_path();
    let config_path = dir.join(CONFIG_FILE);
    if !dir.is_dir() {
        return Err(Error::not_found(dir, "there is no such adapter directory"));
    }
    if !config_path.exists() {
        return Err(absent::without_config(source));
    }
    let mut problems = Vec::new();
    let keys = json::read_object(&config_path)?;
    let patterns = keys.get("rank_pattern").cloned();
    let mut config = config_read::from_object(keys, &mut problems);
    let triplets = Kept::of(&config, patterns.as_ref(), &mut problems);
    let doubts = Doubts::about(&problems);
    let weights = open_weights(source, &mut problems)?;
    let mut sites = BTreeMap::new();
    let mut metadata = BTreeMap::new();
    let mut notes = Vec::new();
    if let Some(weights) = &weights {
        let foreign = weights.paths.iter().zip(&weights.shards);
        let foreign: Vec<Problem> = foreign
            .filter_map(|(path, file)| absent::foreign_adapter(path, file))
            .collect();
        if foreign.is_empty() {
            let sorted = sort_tensors(weights, with_posterior, &mut problems);
            check_names(&sorted, options, &mut notes, &mut problems);
            // A refused modules_to_save already names these weights.
            if !problems
                .iter()
                .any(|problem| problem.at == "modules_to_save")
            {
                check_stored(weights, &sorted.stored, options, &mut notes, &mut problems);
            }
            sites = sorted.sites;
        }
        problems.extend(foreign);
        for shard in &weights.shards {
            metadata.extend(shard.metadata().clone());
        }
        if sites.is_empty() && problems.is_empty() {
            let message = "holds no adapter tensor";
            problems.push(Problem::new(
                "no-tensors",
                WEIGHTS_FILE,
                message,
                SAVE_AGAIN,
            ));
        }
    }
    if !with_posterior {
        config.monteclora = None;
        for parts in sites.values_mut() {
            parts.retain(|role, _| !Role::SAMPLER.contains(role));
        }
    }
    let is_posterior_lost = check_posterior_is_declared(&config, &sites, &mut problems);
    let matcher = noted(Matcher::new(&config), &mut problems);
    let ranks = SitePatterns::new("rank_pattern", &config.rank_pattern);
    let ranks = noted(ranks, &mut problems);
    let alphas = SitePatterns::new("alpha_pattern", &config.alpha_pattern);
    let alphas = noted(alphas, &mut problems);
    let is_one_rank = check_rank(&config, &sites, &doubts, &mut problems);
    let doubts = Doubts {
        ranks: doubts.ranks || is_one_rank,
        ..doubts
    };
    let sites = sites
        .into_iter()
        .filter_map(|(name, parts)| {
            let rules = Rules {
                config: &config,
                ranks: ranks.as_ref()?,
                alphas: alphas.as_ref()?,
                matcher: matcher.as_ref().filter(|_| !doubts.targets),
                trusts_ranks: !doubts.ranks,
                expects_posterior: config.monteclora.is_some() && !is_posterior_lost,
                triplets: triplets.as_ref(),
            };
            assemble(&rules, name, parts, &mut problems)
        })
        .collect::<Vec<Site>>();
    problems.extend(non_finite(&sites));
    Error::refuse_any(dir, problems)?;
    let names: Vec<&str> = sites.iter().map(|site| site.name.as_str()).collect();
    notes.extend(config.without_effect(&names)?);
    Ok(Adapter {
        format: config.peft_format(),
        config,
        sites,
        metadata,
        notes,
    })
}

/// Settings that the configuration has wrong. Problems that follow from them are not reported as well.
#[derive(Debug, Clone, Copy)]
struct Doubts {
    ranks: bool,
    targets: bool,
}

impl Doubts {
    fn about(problems: &[Problem]) -> Self {
        let concerns = |keys: &[&str]| {
            let is_one = |at: &str| {
                let key = at.split('.').next().unwrap_or(at);
                key == "target_parameters" || keys.contains(&key)
            };
            problems.iter().any(|problem| is_one(&problem.at))
        };
        Self {
            ranks: concerns(&["r", "rank_pattern", "monteclora_config"]),
            targets: concerns(&[
                "target_modules",
                "exclude_modules",
                "layers_to_transform",
                "layers_pattern",
            ]),
        }
    }
}

/// Reports an `r` that matches no module although all modules have one rank. Returns true if it does.
fn check_rank(
    config: &AdapterConfig,
    sites: &BTreeMap<String, Parts>,
    doubts: &Doubts,
    problems: &mut Vec<Problem>,
) -> bool {
    if doubts.ranks || !config.rank_pattern.is_empty() || config.peft_type != PeftType::Lora {
        return false;
    }
    let rank_of = |parts: &Parts| match parts.get(&Role::A)?.1.shape() {
        [rank, _] => Some(*rank),
        _ => None,
    };
    let ranks: Option<BTreeSet<usize>> = sites.values().map(rank_of).collect();
    let found = match ranks
        .map(|ranks| ranks.into_iter().collect::<Vec<_>>())
        .as_deref()
    {
        Some([rank]) if *rank != config.r && *rank > 0 && sites.len() > 1 => *rank,
        _ => return false,
    };
    let n = sites.len();
    let message = format!(
        "{}, but lora_A has {found} rows in all {n} modules",
        config.r
    );
    let fix = format!("if the tensors are the right ones, set r to {found} in adapter_config.json");
    problems.push(Problem::new("shape", "r", message, fix));
    true
}

/// Returns the result made from a setting; an error becomes a problem.
fn noted<T>(made: Result<T>, problems: &mut Vec<Problem>) -> Option<T> {
    let (at, message) = match made {
        Ok(made) => return Some(made),
        Err(Error::Problem(problem)) if problem.code == "setting" => (problem.at, problem.message),
        Err(other) => (CONFIG_FILE.to_owned(), other.to_string()),
    };
    let fix = "correct adapter_config.json";
    problems.push(Problem::new("config-value", at, message, fix));
    None
}

/// Opens the weights. If there is only a pickle, it is a problem; if there is nothing at all, an error.
fn open_weights(source: &Source, problems: &mut Vec<Problem>) -> Result<Option<ShardSet>> {
    const PICKLE: &str = "adapter_model.bin";
    let dir = source.dir.as_path();
    let error = match source.open_weights(WEIGHTS_STEM) {
        Err(error) if error.is_not_found() => error,
        opened => return opened.map(Some),
    };
    if dir.join(PICKLE).exists() {
        let message = "a pickle runs code when it is read, so it is not read";
        let fix = "save the adapter as safetensors: PeftModel.save_pretrained(..., safe_serialization=True)";
        problems.push(Problem::new("pickle", PICKLE, message, fix));
        return Ok(None);
    }
    Err(match error {
        Error::Problem(problem) if problem.message.starts_with("no ") => {
            absent::without_weights(dir, WEIGHTS_FILE)
        }
        error => error,
    })
}

/// Compares whole weights with those of the base.
fn check_stored(
    weights: &ShardSet,
    stored: &[(String, Whole)],
    options: &ReadOptions<'_>,
    notes: &mut Vec<String>,
    problems: &mut Vec<Problem>,
) {
    for (name, whole) in stored {
        let Some(tensor) = weights.get(name) else {
            continue;
        };
        match whole.check(name, &tensor, options.base) {
            Some(problem) => problems.push(problem),
            None => notes.push(format!(
                "`{name}` is a copy of the base's weight and is left out"
            )),
        }
    }
}

/// Checks that the sampler's tensors and `monteclora_config` come together. Returns true if the configuration declares
/// a posterior but no module has a sampler.
fn check_posterior_is_declared(
    config: &AdapterConfig,
    sites: &BTreeMap<String, Parts>,
    problems: &mut Vec<Problem>,
) -> bool {
    let has_sampler = |parts: &Parts| parts.keys().any(|role| Role::SAMPLER.contains(role));
    let n_with = sites.values().filter(|parts| has_sampler(parts)).count();
    let is_lost = config.monteclora.is_some() && n_with == 0 && !sites.is_empty();
    if is_lost {
        problems.push(Problem::new(
            "posterior-lost",
            "monteclora_config",
            "set, but no sampler tensor is stored: the posterior is lost and only its mean is left",
            TAKE_THE_MEAN,
        ));
    }
    if config.monteclora.is_none() && n_with > 0 {
        problems.push(Problem::new(
            "posterior-undeclared",
            "monteclora_config",
            format!("null, but {n_with} sites have sampler tensors, whose noise scale is therefore unknown"),
            TAKE_THE_MEAN,
        ));
    }
    is_lost
}

/// What every module is checked against.
struct Rules<'a> {
    config: &'a AdapterConfig,
    ranks: &'a SitePatterns<'a, usize>,
    alphas: &'a SitePatterns<'a, f64>,
    matcher: Option<&'a Matcher<'a>>,
    trusts_ranks: bool,
    expects_posterior: bool,
    triplets: Option<&'a Kept>,
}

/// Checks one module against the configuration and builds it.
fn assemble(
    rules: &Rules<'_>,
    name: String,
    mut parts: Parts,
    problems: &mut Vec<Problem>,
) -> Option<Site> {
    let before = problems.len();
    let config = rules.config;
    let pair = (parts.remove(&Role::A), parts.remove(&Role::B));
    let (Some(a), Some(b)) = pair else {
        let missing = match pair {
            (Some(_), _) => "lora_B missing",
            (_, Some(_)) => "lora_A missing",
            _ => "lora_A and lora_B missing",
        };
        problems.push(Problem::new("incomplete-site", name, missing, SAVE_AGAIN));
        return None;
    };
    for (tensor_name, tensor) in [&a, &b].into_iter().chain(parts.values()) {
        if !tensor.dtype().is_float() && !tensor_name.ends_with("sparse_indices") {
            let message = format!("{} is not a type for weights", tensor.dtype());
            let fix = "save the adapter in float32, float16 or bfloat16";
            problems.push(Problem::new("dtype", tensor_name, message, fix));
        }
    }
    let kept = match rules.triplets {
        Some(kept) => Some(kept.of_module(&name, a.1.shape(), problems)?),
        None => None,
    };
    let rank = noted(rules.ranks.find(&name), problems)?.unwrap_or(config.r);
    let rank = match (config.peft_type, &kept) {
        (PeftType::Ssf | PeftType::Sparse, _) => 0,
        (_, Some(kept)) => kept.iter().filter(|kept| **kept).count(),
        (_, None) => rank,
    };
    let alpha = noted(rules.alphas.find(&name), problems)?.unwrap_or(config.lora_alpha);
    let mut expect = |(tensor_name, tensor): &(String, Tensor), expected: &[Option<usize>]| {
        let found = tensor.shape();
        let mut dims = found.iter().zip(expected);
        let agrees = found.len() == expected.len()
            && dims.all(|(found, wanted)| match wanted {
                Some(size) => size == found,
                None => *found > 0,
            });
        if !agrees {
            let size =
                |size: &Option<usize>| size.map_or("any".to_owned(), |size| size.to_string());
            let expected = expected.iter().map(size).collect::<Vec<_>>().join(", ");
            let message = format!(
                "expected shape [{expected}] by r, rank_pattern and num_samples, found {found:?}"
            );
            let fix = "save the adapter again, or correct adapter_config.json";
            problems.push(Problem::new("shape", tensor_name, message, fix));
        }
    };
    let rank = match (rules.trusts_ranks || rank == 0, a.1.shape()) {
        (false, [rank, _]) => *rank,
        _ => rank,
    };
    expect(&a, &[Some(rank), None]);
    expect(&b, &[None, Some(rank)]);
    let mut posterior = None;
    if let (Some(monteclora), true) = (&config.monteclora, rules.expects_posterior) {
        let n = Some(monteclora.num_samples).filter(|_| rules.trusts_ranks);
        for (role, shape) in [
            (Role::LogStd, &[Some(rank)][..]),
            (Role::LogConcentration, &[n]),
            (Role::LastCovariance, &[Some(rank), Some(rank)]),
            (Role::LastWeights, &[n]),
        ] {
            if let Some(part) = parts.get(&role) {
                expect(part, shape);
            }
        }
        let mut take = |role| Some(parts.remove(&role)?.1);
        match (take(Role::LogStd), take(Role::LogConcentration)) {
            (Some(log_std), Some(log_concentration)) => {
                posterior = Some(SitePosterior {
                    log_std,
                    log_concentration,
                });
            }
            (log_std, _) => {
                let missing = log_std.map_or("std_prior", |_| "expert_weights_prior");
                let message = format!("{SAMPLER}.{missing} missing");
                let fix = TAKE_THE_MEAN;
                problems.push(Problem::new("sampler-incomplete", &name, message, fix));
            }
        }
    }
    let (n_in, n_out) = (a.1.shape().get(1).copied(), b.1.shape().first().copied());
    if rank == 0
        && [n_in, n_out]
            .iter()
            .flatten()
            .any(|size| *size > MAX_FEATURES)
    {
        let message = format!("{n_in:?} inputs and {n_out:?} outputs are more than any module has");
        problems.push(Problem::new("shape", &name, message, SAVE_AGAIN));
        return None;
    }
    let mut take = |role| parts.remove(&role);
    let mut beyond = None;
    let mut missing = |what: &str| {
        let message = format!("{what} missing");
        problems.push(Problem::new("incomplete-site", &name, message, SAVE_AGAIN));
    };
    let (magnitude, scale, shift) = (take(Role::Magnitude), take(Role::Scale), take(Role::Shift));
    let (indices, values, e) = (take(Role::Indices), take(Role::Values), take(Role::E));
    match (config.peft_type, config.use_dora) {
        (PeftType::Lora, true) if magnitude.is_none() => missing("lora_magnitude_vector"),
        (PeftType::AdaLora, _) if e.is_none() => missing("lora_E"),
        (PeftType::Ssf, _) if scale.is_none() => missing("ssf_scale"),
        (PeftType::Sparse, _) if indices.is_none() || values.is_none() => {
            missing("sparse_indices or sparse_values");
        }
        _ => {}
    }
    let kind = config.peft_type;
    for (part, is_known) in [
        (&magnitude, kind == PeftType::Lora && config.use_dora),
        (&e, kind == PeftType::AdaLora),
        (&scale, kind == PeftType::Ssf),
        (&shift, kind == PeftType::Ssf),
        (&indices, kind == PeftType::Sparse),
        (&values, kind == PeftType::Sparse),
    ] {
        if let (Some((tensor_name, _)), false) = (part, is_known) {
            let message = format!("peft_type {} has no such tensor", kind.name());
            let fix = "correct peft_type or use_dora in adapter_config.json";
            problems.push(Problem::new("unknown-tensor", tensor_name, message, fix));
        }
    }
    let mut sized = |part: &Option<(String, Tensor)>, shape: &[Option<usize>]| {
        if let Some((tensor_name, tensor)) = part
            && !tensor
                .shape()
                .iter()
                .copied()
                .map(Some)
                .eq(shape.iter().copied())
        {
            let message = format!("expected shape {shape:?}, found {:?}", tensor.shape());
            let message = message.replace("Some(", "").replace(')', "");
            problems.push(Problem::new("shape", tensor_name, message, SAVE_AGAIN));
        }
    };
    match kind {
        PeftType::Lora if config.use_dora => sized(&magnitude, &[n_out]),
        PeftType::Lora => {}
        PeftType::AdaLora => sized(&e, &[Some(rank), Some(1)]),
        PeftType::Ssf => [&scale, &shift]
            .into_iter()
            .for_each(|part| sized(part, &[n_out])),
        PeftType::Sparse => {
            let n = indices.as_ref().map(|(_, indices)| indices.n_elements());
            sized(&values, &[n]);
        }
    }
    if let Some((_, magnitude)) = magnitude {
        beyond = Some(Beyond::Magnitude(magnitude));
    } else if let Some((_, scale)) = scale {
        let shift = shift.map(|(_, shift)| shift);
        beyond = Some(Beyond::Scale { scale, shift });
    } else if let (Some((_, indices)), Some((_, values))) = (indices, values) {
        let whole = n_in
            .zip(n_out)
            .map(|(n_in, n_out)| (n_in as u64).saturating_mul(n_out as u64));
        let found = places(&indices, &name);
        let found = found.map_err(|error| error.to_string()).and_then(|places| {
            let inside = places.last().is_none_or(|last| Some(*last) < whole);
            inside
                .then_some(())
                .ok_or_else(|| "a place is outside of the weight".to_owned())
        });
        if let Err(message) = found {
            problems.push(Problem::new("sparse", &name, message, SAVE_AGAIN));
        }
        beyond = Some(Beyond::Sparse { indices, values });
    }
    let is_targeted = rules
        .matcher
        .and_then(|matcher| noted(matcher.matches(&name), problems));
    if is_targeted == Some(false) {
        let message =
            "has tensors but is not among target_modules, so PEFT would leave them unused";
        let fix = "correct target_modules, exclude_modules or layers_to_transform";
        problems.push(Problem::new("not-targeted", &name, message, fix));
    }
    if problems.len() > before {
        return None;
    }
    let mut site = Site {
        rank,
        alpha,
        scaling: match rank {
            0 => 1.0,
            rank => config.scaling(alpha, rank),
        },
        lora_a: a.1,
        lora_b: b.1,
        posterior,
        beyond,
        triplets: None,
        name,
    };
    if let (Some(kept), Some((_, lora_e))) = (kept, e) {
        let triplets = Triplets {
            lora_a: site.lora_a.clone(),
            lora_e,
            kept,
        };
        // PEFT's scale stays that of the initial rank; a single precision number of its own is added to it there.
        let initial = triplets.kept.len() as f64;
        let alpha = if alpha > 0.0 { alpha } else { initial };
        site.scaling = alpha / (initial + 1e-5);
        site.alpha = site.scaling * rank as f64;
        match triplets.product() {
            Ok(product) => site.lora_a = product,
            Err(error) => {
                let message = error.to_string();
                problems.push(Problem::new("dtype", &site.name, message, SAVE_AGAIN));
                return None;
            }
        }
        site.triplets = Some(triplets);
    }
    Some(site)
}

/// Largest input or output that is believed where no tensor holds it.
const MAX_FEATURES: usize = 1 << 24;

/// AdaLoRA's `rank_pattern`: which singular values of a module are kept.
struct Kept {
    initial: usize,
    by_module: BTreeMap<String, Vec<bool>>,
}

impl Kept {
    /// Of an AdaLoRA adapter; `None` for others.
    fn of(
        config: &AdapterConfig,
        pattern: Option<&Value>,
        problems: &mut Vec<Problem>,
    ) -> Option<Self> {
        let initial = config.adalora.as_ref()?.init_r;
        let mut by_module = BTreeMap::new();
        for (key, value) in pattern.and_then(Value::as_object).into_iter().flatten() {
            let flags = value.as_array().into_iter().flatten().map(Value::as_bool);
            let flags: Option<Vec<bool>> = flags.collect();
            let name = key.strip_prefix(PREFIX).unwrap_or(key);
            let name = name.strip_suffix(".lora_E").unwrap_or(name);
            match flags {
                Some(flags) if flags.len() == initial => {
                    by_module.insert(name.to_owned(), flags);
                }
                _ => {
                    let message = format!("expected {initial} flags, init_r of them");
                    let at = format!("rank_pattern.{key}");
                    let fix = "save the adapter again";
                    problems.push(Problem::new("config-value", at, message, fix));
                }
            }
        }
        Some(Self { initial, by_module })
    }

    /// Of the module `name`, whose A has this shape: all, if nothing was pruned.
    fn of_module(
        &self,
        name: &str,
        shape: &[usize],
        problems: &mut Vec<Problem>,
    ) -> Option<Vec<bool>> {
        let all = || vec![true; self.initial];
        let kept = self.by_module.get(name).cloned().unwrap_or_else(all);
        let n = kept.iter().filter(|kept| **kept).count();
        if shape.first() == Some(&n) {
            return Some(kept);
        }
        if shape.first() == Some(&self.initial) {
            // Saved before it was pruned.
            return Some(all());
        }
        let message =
            format!("rank_pattern keeps {n} singular values, but lora_A has shape {shape:?}");
        problems.push(Problem::new("shape", name, message, SAVE_AGAIN));
        None
    }
}

/// Returns a problem for each weight with a NaN or infinite value. Modules are checked in parallel.
pub(crate) fn non_finite(sites: &[Site]) -> Vec<Problem> {
    sites
        .par_iter()
        .flat_map_iter(|site| {
            let posterior = site.posterior.iter().flat_map(|posterior| {
                [
                    ("std_prior", &posterior.log_std),
                    ("expert_weights_prior", &posterior.log_concentration),
                ]
            });
            [("lora_A", &site.lora_a), ("lora_B", &site.lora_b)]
                .into_iter()
                .chain(posterior)
                .chain(site.beyond.iter().flat_map(Beyond::tensors))
                .filter_map(|(part, tensor)| {
                    let at = tensor.first_non_finite()?;
                    Some(Problem::new(
                        "non-finite",
                        format!("{}.{part}", site.name),
                        format!("element {at} is NaN, infinite or beyond the range of float32"),
                        "the training that made it diverged: use an earlier checkpoint",
                    ))
                })
                .collect::<Vec<_>>()
        })
        .collect()
}

#[cfg(test)]
mod tests;
