//! Reading a PEFT directory: every tensor is given its place or becomes a problem.

use std::collections::BTreeMap;
use std::path::Path;

use rayon::prelude::*;

use super::config_read;
use crate::adapter::{Adapter, Site, SitePosterior};
use crate::config::AdapterConfig;
use crate::error::{Error, Result};
use crate::json;
use crate::problem::Problem;
use crate::site_pattern::SitePatterns;
use crate::targets::Matcher;
use crate::tensors::shards::ShardSet;
use crate::tensors::tensor::Tensor;

/// File names of a PEFT directory.
pub(crate) const CONFIG_FILE: &str = "adapter_config.json";
pub(crate) const WEIGHTS_FILE: &str = "adapter_model.safetensors";
pub(crate) const WEIGHTS_STEM: &str = "adapter_model";
/// What PEFT puts before a module's path.
pub(crate) const PREFIX: &str = "base_model.model.";
const SAMPLER: &str = "lora_monteclora_sampler";

/// A tensor's place in a site.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Role {
    A,
    B,
    LogStd,
    LogConcentration,
    LastCovariance,
    LastWeights,
}

/// The sampler's tensors by PEFT's names.
pub(crate) const SAMPLER_FIELDS: [(&str, Role); 4] = [
    ("std_prior", Role::LogStd),
    ("expert_weights_prior", Role::LogConcentration),
    ("gaussian_var_prior", Role::LastCovariance),
    ("expert_weights", Role::LastWeights),
];

/// The tensors of one site, by place, with their full names.
type Parts = BTreeMap<Role, (String, Tensor)>;

/// Reads `dir`; without `with_posterior` the sampler is ignored.
pub(crate) fn read_dir(dir: &Path, with_posterior: bool) -> Result<Adapter> {
    let config_path = dir.join(CONFIG_FILE);
    if !dir.is_dir() {
        return Err(Error::not_found(dir, "there is no such adapter directory"));
    }
    if !config_path.exists() {
        return Err(Error::not_found(
            &config_path,
            "a PEFT adapter directory must hold this file",
        ));
    }
    let mut problems = Vec::new();
    let mut config = config_read::from_object(json::read_object(&config_path)?, &mut problems);
    let weights = open_weights(dir, &mut problems)?;
    let mut sites = BTreeMap::new();
    let mut metadata = BTreeMap::new();
    if let Some(weights) = &weights {
        sites = sort_tensors(weights, with_posterior, &mut problems);
        for shard in &weights.shards {
            metadata.extend(shard.metadata().clone());
        }
        if sites.is_empty() && problems.is_empty() {
            problems.push(Problem::new(
                "no-tensors",
                WEIGHTS_FILE,
                "holds no adapter tensor",
                "save the adapter again",
            ));
        }
    }
    if !with_posterior {
        config.monteclora = None;
        for parts in sites.values_mut() {
            parts.retain(|role, _| matches!(role, Role::A | Role::B));
        }
    }
    let is_posterior_lost = check_posterior_is_declared(&config, &sites, &mut problems);
    let matcher = Matcher::new(&config)
        .map_err(|error| note(&mut problems, &error))
        .ok();
    let ranks = SitePatterns::new("rank_pattern", &config.rank_pattern)
        .map_err(|error| note(&mut problems, &error))
        .ok();
    let alphas = SitePatterns::new("alpha_pattern", &config.alpha_pattern)
        .map_err(|error| note(&mut problems, &error))
        .ok();
    let sites = sites
        .into_iter()
        .filter_map(|(name, parts)| {
            let rules = Rules {
                config: &config,
                ranks: ranks.as_ref()?,
                alphas: alphas.as_ref()?,
                matcher: matcher.as_ref(),
                expects_posterior: config.monteclora.is_some() && !is_posterior_lost,
            };
            assemble(&rules, name, parts, &mut problems)
        })
        .collect::<Vec<Site>>();
    problems.extend(non_finite(&sites));
    Error::refuse_any(dir, problems)?;
    Ok(Adapter {
        format: config.peft_format(),
        config,
        sites,
        metadata,
    })
}

/// Turns an error about a setting into a problem.
fn note(problems: &mut Vec<Problem>, error: &Error) {
    let (at, message) = match error {
        Error::Problem(problem) if problem.code == "setting" => {
            (problem.at.clone(), problem.message.clone())
        }
        other => (CONFIG_FILE.to_owned(), other.to_string()),
    };
    problems.push(Problem::new(
        "config-value",
        at,
        message,
        "correct adapter_config.json",
    ));
}

/// Opens the weights; a pickle alone is a problem, nothing at all an error.
fn open_weights(dir: &Path, problems: &mut Vec<Problem>) -> Result<Option<ShardSet>> {
    match ShardSet::open(dir, WEIGHTS_STEM) {
        Ok(weights) => Ok(Some(weights)),
        Err(error) if error.is_not_found() => {
            const PICKLE: &str = "adapter_model.bin";
            if dir.join(PICKLE).exists() {
                problems.push(Problem::new(
                    "pickle",
                    PICKLE,
                    "a pickle runs code when it is read, so it is not read",
                    "save the adapter as safetensors: PeftModel.save_pretrained(..., safe_serialization=True)",
                ));
                return Ok(None);
            }
            match &error {
                Error::Problem(problem) if problem.message.starts_with("no ") => {
                    Err(Error::not_found(
                        &dir.join(WEIGHTS_FILE),
                        "a PEFT adapter directory must hold this file",
                    ))
                }
                _ => Err(error),
            }
        }
        Err(error) => Err(error),
    }
}

/// Gives every tensor its site and place, or notes why it has none.
fn sort_tensors(
    weights: &ShardSet,
    with_posterior: bool,
    problems: &mut Vec<Problem>,
) -> BTreeMap<String, Parts> {
    let mut sites: BTreeMap<String, Parts> = BTreeMap::new();
    for name in weights.names() {
        if !with_posterior && is_of_authors_sampler(name) {
            continue;
        }
        match place(name) {
            Ok((module, role)) => {
                let Some(tensor) = weights.get(name) else {
                    continue;
                };
                let parts = sites.entry(module).or_default();
                if let Some((other, _)) = parts.insert(role, (name.to_owned(), tensor)) {
                    problems.push(Problem::new(
                        "ambiguous",
                        name,
                        format!("stands for the same tensor as {other}"),
                        "save one adapter alone",
                    ));
                }
            }
            Err(problem) => problems.push(problem),
        }
    }
    sites
}

/// Whether the tensor belongs to the sampler of the authors' own code.
fn is_of_authors_sampler(name: &str) -> bool {
    name.split('.').any(|part| part.starts_with("mc_sampler"))
}

/// Parts of names, those with a dot at the start of a component: the code of the refusal, its message and its remedy.
const REFUSED_PARTS: &str = "\
lora_magnitude_vector | dora | the magnitudes of DoRA | merge it into the base with PEFT (merge_and_unload), or train without DoRA
.lora_embedding_ | embedding | LoRA on an embedding | train without adapting embeddings
trainable_tokens | trainable-tokens | trained token embeddings | train without trainable_token_indices
token_adapter | trainable-tokens | trained token embeddings | train without trainable_token_indices
.mc_sampler | unknown-tensor | the sampler of the authors' code, whose noise has another scale than PEFT's | convert it to plain LoRA explicitly to use the mean";

/// Module and place of the tensor called `name`.
fn place(name: &str) -> Result<(String, Role), Problem> {
    let refuse = |code, message: &str, fix: &str| Err(Problem::new(code, name, message, fix));
    let components: Vec<&str> = name.split('.').collect();
    if components.iter().any(|part| part.is_empty())
        || name.contains(['/', '\\'])
        || name.chars().any(char::is_control)
    {
        return refuse(
            "tensor-name",
            "not the name of a tensor",
            "save the adapter again",
        );
    }
    let dotted = format!(".{name}");
    for row in REFUSED_PARTS.lines() {
        if let [part, code, message, fix] = row.split(" | ").collect::<Vec<_>>()[..]
            && dotted.contains(part)
        {
            return refuse(code, message, fix);
        }
    }
    let Some(rest) = name.strip_prefix(PREFIX) else {
        return refuse(
            "unknown-tensor",
            "does not start with base_model.model., so it is not PEFT's",
            "save the adapter with PEFT",
        );
    };
    let parts: Vec<&str> = rest.split('.').collect();
    let Some(at) = parts.iter().rposition(|part| part.starts_with("lora_")) else {
        return refuse(
            "modules-to-save",
            "a whole weight, trained besides the adapter (modules_to_save or a bias)",
            "merge it into the base with PEFT (merge_and_unload), or train without it",
        );
    };
    let module = parts[..at].join(".");
    // The adapter's name may stand between, as in `lora_A.default.weight`.
    let (field, has_known_depth) = match parts[at + 1..] {
        [field] | [_, field] => (field, true),
        _ => ("", false),
    };
    let role = match (parts[at], field) {
        ("lora_A", "weight") => Some(Role::A),
        ("lora_B", "weight") => Some(Role::B),
        ("lora_A" | "lora_B", "bias") => {
            return refuse(
                "bias",
                "a bias of the adapter",
                "train with lora_bias=False",
            );
        }
        (SAMPLER, field) => SAMPLER_FIELDS
            .iter()
            .find(|(known, _)| *known == field)
            .map(|(_, role)| *role),
        _ => None,
    };
    match role {
        Some(role) if has_known_depth && !module.is_empty() => Ok((module, role)),
        _ => refuse(
            "unknown-tensor",
            "not understood",
            "only LoRA and MonteCLoRA on linear layers can be converted",
        ),
    }
}

/// The sampler's tensors and `monteclora_config` come together; true if no sampler is left at any site.
fn check_posterior_is_declared(
    config: &AdapterConfig,
    sites: &BTreeMap<String, Parts>,
    problems: &mut Vec<Problem>,
) -> bool {
    let has_sampler = |parts: &Parts| parts.keys().any(|role| !matches!(role, Role::A | Role::B));
    let n_with = sites.values().filter(|parts| has_sampler(parts)).count();
    let is_lost = config.monteclora.is_some() && n_with == 0 && !sites.is_empty();
    if is_lost {
        problems.push(Problem::new(
            "posterior-lost",
            "monteclora_config",
            "set, but no sampler tensor is stored: the posterior is lost and only its mean is left",
            "to use the mean, set monteclora_config to null or convert the adapter to plain LoRA explicitly",
        ));
    }
    if config.monteclora.is_none() && n_with > 0 {
        problems.push(Problem::new(
            "posterior-undeclared",
            "monteclora_config",
            format!("null, but {n_with} sites have sampler tensors, whose noise scale is therefore unknown"),
            "restore monteclora_config, or convert the adapter to plain LoRA explicitly to use the mean",
        ));
    }
    is_lost
}

/// What every site is checked against.
struct Rules<'a> {
    config: &'a AdapterConfig,
    ranks: &'a SitePatterns<'a, usize>,
    alphas: &'a SitePatterns<'a, f64>,
    matcher: Option<&'a Matcher<'a>>,
    expects_posterior: bool,
}

/// Checks one site against the configuration and builds it.
fn assemble(
    rules: &Rules<'_>,
    name: String,
    mut parts: Parts,
    problems: &mut Vec<Problem>,
) -> Option<Site> {
    let before = problems.len();
    let config = rules.config;
    let fix_shape = "save the adapter again, or correct adapter_config.json";
    let (a, b) = match (parts.remove(&Role::A), parts.remove(&Role::B)) {
        (Some(a), Some(b)) => (a, b),
        (a, b) => {
            let missing = match (a.is_some(), b.is_some()) {
                (true, _) => "lora_B",
                (_, true) => "lora_A",
                _ => "lora_A and lora_B",
            };
            problems.push(Problem::new(
                "incomplete-site",
                &name,
                format!("{missing} missing"),
                "save the adapter again",
            ));
            return None;
        }
    };
    for (tensor_name, tensor) in [&a, &b].into_iter().chain(parts.values()) {
        if !tensor.dtype().is_float() {
            problems.push(Problem::new(
                "dtype",
                tensor_name,
                format!("{} is not a type for weights", tensor.dtype()),
                "save the adapter in float32, float16 or bfloat16",
            ));
        }
    }
    let rank = rules
        .ranks
        .find(&name)
        .map_err(|error| note(problems, &error))
        .ok()?
        .unwrap_or(config.r);
    let alpha = rules
        .alphas
        .find(&name)
        .map_err(|error| note(problems, &error))
        .ok()?
        .unwrap_or(config.lora_alpha);
    let mut expect = |(tensor_name, tensor): &(String, Tensor), expected: &[Option<usize>]| {
        let found = tensor.shape();
        let agrees = found.len() == expected.len()
            && found
                .iter()
                .zip(expected)
                .all(|(found, expected)| expected.is_none_or(|size| size == *found) && *found > 0);
        if !agrees {
            let expected: Vec<String> = expected
                .iter()
                .map(|size| size.map_or("any".to_owned(), |size| size.to_string()))
                .collect();
            problems.push(Problem::new(
                "shape",
                tensor_name,
                format!(
                    "expected shape [{}] by r, rank_pattern and num_samples, found {found:?}",
                    expected.join(", ")
                ),
                fix_shape,
            ));
        }
    };
    expect(&a, &[Some(rank), None]);
    expect(&b, &[None, Some(rank)]);
    let posterior = match &config.monteclora {
        Some(monteclora) if rules.expects_posterior => {
            let n = Some(monteclora.num_samples);
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
            match (
                parts.remove(&Role::LogStd),
                parts.remove(&Role::LogConcentration),
            ) {
                (Some((_, log_std)), Some((_, log_concentration))) => Some(SitePosterior {
                    log_std,
                    log_concentration,
                }),
                (log_std, _) => {
                    let missing = if log_std.is_some() {
                        "expert_weights_prior"
                    } else {
                        "std_prior"
                    };
                    problems.push(Problem::new(
                        "sampler-incomplete",
                        &name,
                        format!("{SAMPLER}.{missing} missing"),
                        "save the adapter again, or convert it to plain LoRA explicitly to use the mean",
                    ));
                    None
                }
            }
        }
        _ => None,
    };
    if let Some(matcher) = rules.matcher {
        match matcher.matches(&name) {
            Ok(true) => {}
            Ok(false) => problems.push(Problem::new(
                "not-targeted",
                &name,
                "has tensors but is not among target_modules, so PEFT would leave them unused",
                "correct target_modules, exclude_modules or layers_to_transform",
            )),
            Err(error) => note(problems, &error),
        }
    }
    (problems.len() == before).then(|| Site {
        rank,
        alpha,
        scaling: config.scaling(alpha, rank),
        lora_a: a.1,
        lora_b: b.1,
        posterior,
        name,
    })
}

/// Weights that are NaN or infinite, all sites side by side.
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
