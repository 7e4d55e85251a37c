//! Starts a run from an existing adapter. The run has the adapter's shape, and keys of run.toml that contradict it are
//! errors.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Result, bail};
use monteclora_adapters::methods::monteclora::{MonteCloraConfig, Objective};
use monteclora_adapters::methods::{Method, Module};
use monteclora_converters::{
    Adapter, AdapterConfig, Beyond, LinearModule, ModelFiles, MonteCloraSettings, PeftType,
    Problem, Site, TargetModules,
};

use crate::config::LoraConfig;
use crate::provenance::read_fitting;

/// Reads `lora.init_from`, and sets `lora` and `config` to the adapter's values where run.toml gives none.
///
/// # Errors
/// Returns an error if the adapter does not fit the base model `files` or has modules for other media, and one for all
/// given keys that contradict the adapter.
pub(super) fn read(
    lora: &mut LoraConfig,
    config: &mut AdapterConfig,
    files: &ModelFiles,
    modules: &[LinearModule],
) -> Result<Option<Adapter>> {
    let Some(dir) = lora.init_from.clone() else {
        return Ok(None);
    };
    let mut adapter = read_fitting(&dir, files)?;
    let format = adapter.config.peft_format();
    if adapter.config.peft_type == PeftType::AdaLora {
        // Its singular values are multiplied into A.
        adapter = adapter.collapse();
    }
    require_method(&lora.method()?, &adapter, (&dir, format))?;
    if let Some(site) = adapter
        .sites
        .iter()
        .find(|site| files.is_beside(&site.name))
    {
        let message = "is for other media than text, which are not trained here";
        let fix = "start from an adapter of the language model alone";
        bail!(Problem::new("other-media", &site.name, message, fix));
    }
    let mut problems = contradictions(lora, config, &adapter, modules)?;
    let settings = posterior(lora, &adapter, &mut problems);
    if !problems.is_empty() {
        bail!(Problem::usage(format!(
            "run.toml contradicts the adapter `{}` it starts from:\n  {}\nleave these keys out to take the adapter's values",
            dir.display(),
            problems.join("\n  ")
        )));
    }
    if adapter.config.monteclora.is_some() && lora.monteclora.is_none() {
        tracing::warn!(
            "`{}` has a posterior, which method \"{}\" drops",
            dir.display(),
            lora.method.0
        );
    }
    let theirs = &adapter.config;
    (lora.r, lora.lora_alpha, lora.use_rslora) = (theirs.r, theirs.lora_alpha, theirs.use_rslora);
    lora.rank_pattern = theirs.rank_pattern.clone();
    lora.alpha_pattern = theirs.alpha_pattern.clone();
    lora.target_modules = theirs.target_modules.clone().into();
    lora.layers_to_transform = theirs.layers_to_transform.clone();
    lora.layers_pattern = theirs.layers_pattern.clone().unwrap_or_default();
    lora.exclude_modules = theirs.exclude_modules.clone().map(Into::into);
    if let (Some(run), Some(settings)) = (&mut lora.monteclora, &settings) {
        *run = MonteCloraConfig {
            preset: run.preset,
            objective: run.objective,
            kl_warmup_ratio: run.kl_warmup_ratio,
            prior_std: run.prior_std,
            temperature: run.temperature,
            ..MonteCloraConfig::from(settings)
        };
    }
    *config = AdapterConfig {
        base_model_name_or_path: config.base_model_name_or_path.take(),
        revision: config.revision.take(),
        lora_dropout: config.lora_dropout,
        monteclora: settings,
        ..adapter.config.clone()
    };
    Ok(Some(adapter))
}

/// Refuses an adapter that the method cannot go on with.
fn require_method(
    method: &Arc<dyn Method>,
    adapter: &Adapter,
    (dir, format): (&Path, &str),
) -> Result<()> {
    let name = method.kind().name;
    let goes_on = |site: &Site| {
        let module = Module {
            has_bias: matches!(site.beyond, Some(Beyond::Scale { shift: Some(_), .. })),
            ..Module::from(site)
        };
        let parameters = method.parameters(&module);
        let reads = |leaf: &str| parameters.iter().any(|p| p.peft == Some(leaf));
        let beyond = site
            .beyond
            .as_ref()
            .map(Beyond::tensors)
            .unwrap_or_default();
        // A magnitude is not that of the weight once B is not zero.
        let lacks = beyond.is_empty() && reads("lora_magnitude_vector");
        beyond.iter().all(|(leaf, _)| reads(leaf))
            && (site.rank == 0 || reads("lora_A.weight"))
            && !lacks
    };
    if !adapter.sites.iter().all(goes_on) {
        let message = format!(
            "`{}` (format {format}) has the trained update, but not the values that method \"{name}\" trains",
            dir.display()
        );
        let is_low_rank = adapter.sites.iter().all(|site| site.beyond.is_none());
        let fix = match is_low_rank {
            true => {
                "--resume auto continues the run that made it; method = \"lora\" trains its update further"
            }
            false => {
                "--resume auto continues the run that made it; or merge it into its base (`monteclora merge`) and train on the result"
            }
        };
        bail!(Problem::new("init-from", "lora.init_from", message, fix).exit(2));
    }
    Ok(())
}

/// The targets of `config`, with those of the adapter for keys that are not given.
fn merged_targets(config: &AdapterConfig, theirs: &AdapterConfig, given: &[&str]) -> AdapterConfig {
    let is_given = |key: &str| given.iter().any(|given| *given == format!("lora.{key}"));
    let mut merged = config.clone();
    // Layers and exclusions confine no module that is named in full, as where the base has other parts than the language model.
    let is_in_full = matches!(&theirs.target_modules, TargetModules::List(names) if names.iter().any(|name| name.contains(".layers.")));
    if !is_given("target_modules") && !is_in_full {
        merged.target_modules = theirs.target_modules.clone();
    }
    if !is_given("exclude_modules") {
        merged.exclude_modules = theirs.exclude_modules.clone();
    }
    if !is_given("layers_to_transform") {
        merged.layers_to_transform = theirs.layers_to_transform.clone();
    }
    if !is_given("layers_pattern") {
        merged.layers_pattern = theirs.layers_pattern.clone();
    }
    merged
}

/// One line for every given key of shape or targets that differs from the adapter.
fn contradictions(
    lora: &LoraConfig,
    config: &AdapterConfig,
    adapter: &Adapter,
    modules: &[LinearModule],
) -> Result<Vec<String>> {
    let theirs = &adapter.config;
    let mut problems = Vec::new();
    macro_rules! compare {
        ($($key:ident $shown:literal)*) => {$(
            let key = concat!("lora.", stringify!($key));
            if lora.$key != theirs.$key && lora.given.iter().any(|given| given == key) {
                let (ours, theirs) = (&lora.$key, &theirs.$key);
                let shown = format!(concat!($shown, ", the adapter has ", $shown), ours, theirs);
                problems.push(format!("{key}: {shown}"));
            }
        )*};
    }
    compare!(r "{}" lora_alpha "{}" use_rslora "{}" rank_pattern "{:?}" alpha_pattern "{:?}");
    let targets: Vec<&str> = lora
        .given
        .iter()
        .map(String::as_str)
        .filter(|key| key.ends_with("_modules") || key.starts_with("lora.layers"))
        .collect();
    if !targets.is_empty() {
        let mut ours = merged_targets(config, theirs, &targets).resolve_targets(modules)?;
        let mut theirs: Vec<String> = adapter.sites.iter().map(|s| s.name.clone()).collect();
        ours.sort();
        theirs.sort();
        if ours != theirs {
            problems.push(format!(
                "{}: {} sites, the adapter has {}, not the same",
                targets.join(", "),
                ours.len(),
                theirs.len()
            ));
        }
    }
    Ok(problems)
}

/// The settings of the posterior. Given keys and a given preset have priority over the adapter's settings.
fn posterior(
    lora: &LoraConfig,
    adapter: &Adapter,
    problems: &mut Vec<String>,
) -> Option<MonteCloraSettings> {
    let run = MonteCloraSettings::from(lora.monteclora.as_ref()?);
    let Some(theirs) = &adapter.config.monteclora else {
        return Some(run);
    };
    let of_evidence = |lora: &LoraConfig| {
        let monteclora = lora.monteclora.as_ref();
        monteclora.is_some_and(|m| m.objective == Objective::Elbo)
    };
    if of_evidence(lora) && theirs.num_samples != 1 {
        problems.push(format!(
            "lora.monteclora.objective: \"elbo\" has one component, the adapter's posterior {}; start from its mean, which `monteclora collapse` writes",
            theirs.num_samples
        ));
    }
    let given = |key: &str| lora.given.contains(&format!("lora.monteclora.{key}"));
    if given("num_samples") && run.num_samples != theirs.num_samples {
        problems.push(format!(
            "lora.monteclora.num_samples: {}, the adapter has {}",
            run.num_samples, theirs.num_samples
        ));
    }
    let mut settings = theirs.clone();
    settings.buffer_size = run.buffer_size;
    let ours = |key: &str| given(key) || given("preset");
    macro_rules! take {
        ($($key:ident)*) => {$(if ours(stringify!($key)) { settings.$key = run.$key; })*};
    }
    take!(sample_scaler kl_loss_weight dirichlet_prior use_entropy);
    Some(settings)
}
