//! What each runtime refuses in an adapter, or gets silently wrong, and the remedy.

use std::fmt;
use std::str::FromStr;

use crate::adapter::Adapter;
use crate::config::{AdapterConfig, TargetModules};
use crate::dtype::DType;
use crate::error::{Error, Problem, Result};
use crate::model_files::ModelFiles;
use crate::targets::{OUTPUT_HEAD, ends_in};

/// A program that reads adapters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Runtime {
    /// mistral.rs 0.8.1, its own LoRA path. Serving through this project merges instead and has none of its limits.
    Mistralrs,
    /// mistral.rs 0.9.1 and later.
    Mistralrs09,
    /// vLLM.
    Vllm,
    /// llama.cpp, by way of its `convert_lora_to_gguf.py`.
    LlamaCpp,
    /// PEFT 0.20 and later.
    Peft,
}

/// Names as on the command line.
const NAMES: [(Runtime, &str); 5] = [
    (Runtime::Mistralrs, "mistralrs"),
    (Runtime::Mistralrs09, "mistralrs-0.9"),
    (Runtime::Vllm, "vllm"),
    (Runtime::LlamaCpp, "llamacpp"),
    (Runtime::Peft, "peft"),
];

impl fmt::Display for Runtime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = NAMES
            .iter()
            .find(|(runtime, _)| runtime == self)
            .map_or("?", |(_, name)| name);
        f.write_str(name)
    }
}

impl FromStr for Runtime {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        NAMES
            .iter()
            .find(|(_, name)| *name == text)
            .map(|(runtime, _)| *runtime)
            .ok_or_else(|| {
                let known: Vec<&str> = NAMES.iter().map(|(_, name)| *name).collect();
                Error::setting(
                    "runtime",
                    format!("unknown runtime `{text}`; expected {}", known.join(", ")),
                )
            })
    }
}

const EXPORT: &str =
    "export it as plain LoRA: the posterior mean with one rank, one alpha and a list of modules";

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
        problems.push(Problem::new(
            "no-effect",
            "adapter",
            "B A is zero at every site, so the adapter changes nothing",
            "train it first",
        ));
    }
    if let Some(base) = base {
        problems.extend(adapter.check_against(base)?);
    }
    for runtime in runtimes {
        let mut report = Report {
            runtime: *runtime,
            problems: &mut problems,
        };
        check_runtime(adapter, &mut report);
        if let (Runtime::Mistralrs | Runtime::Mistralrs09, Some(base)) = (*runtime, base) {
            check_coverage(adapter, base, &mut report);
        }
    }
    Ok(problems)
}

struct Report<'a> {
    runtime: Runtime,
    problems: &'a mut Vec<Problem>,
}

impl Report<'_> {
    fn add(&mut self, code: &'static str, location: &str, message: &str, fix: &str) {
        self.problems.push(Problem::new(
            code,
            location,
            format!("{}: {message}", self.runtime),
            fix,
        ));
    }
}

/// Largest rank a runtime takes without being told otherwise.
fn max_rank(runtime: Runtime) -> Option<(usize, &'static str)> {
    match runtime {
        Runtime::Vllm => Some((16, "start vLLM with --max-lora-rank at least as large")),
        Runtime::Mistralrs09 => Some((256, "raise lora_max_rank, or train with a lower rank")),
        _ => None,
    }
}

fn check_runtime(adapter: &Adapter, report: &mut Report<'_>) {
    let config = &adapter.config;
    let runtime = report.runtime;
    let is_peft = runtime == Runtime::Peft;
    let ignored = "is ignored, so the update would silently have the wrong scale";
    if config.monteclora.is_some() {
        match runtime {
            // Unknown keys and tensors are left unread there, which leaves the posterior mean.
            Runtime::Mistralrs | Runtime::Peft => {}
            Runtime::Mistralrs09 => report.add(
                "monteclora",
                "monteclora_config",
                "is refused, and so are the sampler's tensors",
                EXPORT,
            ),
            Runtime::Vllm => report.add(
                "monteclora",
                "adapter_model.safetensors",
                "the sampler's tensors are refused",
                EXPORT,
            ),
            Runtime::LlamaCpp => report.add(
                "monteclora",
                "adapter_model.safetensors",
                "the converter fails on the sampler's tensors",
                EXPORT,
            ),
        }
    }
    if config.use_rslora {
        match runtime {
            Runtime::Mistralrs | Runtime::LlamaCpp => {
                report.add("rslora", "use_rslora", ignored, EXPORT)
            }
            Runtime::Mistralrs09 | Runtime::Vllm | Runtime::Peft => {}
        }
    }
    if !config.alpha_pattern.is_empty() && !is_peft {
        report.add("alpha-pattern", "alpha_pattern", ignored, EXPORT);
    }
    if !config.rank_pattern.is_empty() {
        match runtime {
            Runtime::Peft => {}
            Runtime::Mistralrs => report.add(
                "rank-pattern",
                "rank_pattern",
                "sites of another rank fail to load",
                EXPORT,
            ),
            _ => report.add(
                "rank-pattern",
                "rank_pattern",
                "sites of another rank get the wrong scale or fail to load",
                EXPORT,
            ),
        }
    }
    check_targets(config, report);
    if let Some((limit, fix)) = max_rank(runtime)
        && let Some(rank) = adapter
            .sites
            .iter()
            .map(|site| site.rank)
            .max()
            .filter(|rank| *rank > limit)
    {
        report.add(
            "rank-limit",
            "r",
            &format!("rank {rank} is above the limit of {limit}"),
            fix,
        );
    }
    if runtime == Runtime::Mistralrs09
        && let Some(rank) = adapter
            .sites
            .iter()
            .map(|site| site.rank)
            .max()
            .filter(|rank| (129..=256).contains(rank))
    {
        report.add(
            "slow-rank",
            "r",
            &format!("rank {rank} is above 128, where the fast CUDA kernel ends"),
            "expect a slower path",
        );
    }
    for site in &adapter.sites {
        if site.name == OUTPUT_HEAD {
            match runtime {
                Runtime::Mistralrs => report.add(
                    "lm-head",
                    &site.name,
                    "left unadapted where the head is tied or built without LoRA",
                    "merge the adapter into the base, or train without lm_head",
                ),
                Runtime::Mistralrs09 => report.add(
                    "lm-head",
                    &site.name,
                    "LoRA on the head is refused",
                    "merge it, or train without lm_head",
                ),
                Runtime::Vllm => report.add(
                    "lm-head",
                    &site.name,
                    "LoRA on the head is not applied by every version",
                    "merge the adapter into the base, or train without lm_head",
                ),
                Runtime::LlamaCpp | Runtime::Peft => {}
            }
        }
        let types = [site.lora_a.dtype(), site.lora_b.dtype()];
        if types.contains(&DType::F64) && !is_peft {
            report.add(
                "dtype",
                &site.name,
                "float64 fails to load",
                "export it as float32",
            );
        }
    }
}

/// Forms of `target_modules` and of the keys that confine it.
fn check_targets(config: &AdapterConfig, report: &mut Report<'_>) {
    let runtime = report.runtime;
    let is_string = !matches!(config.target_modules, TargetModules::List(_));
    if is_string && matches!(runtime, Runtime::Mistralrs) {
        report.add(
            "target-modules-form",
            "target_modules",
            "only a list of names can be read",
            EXPORT,
        );
    }
    if let (TargetModules::Regex(_), Runtime::Vllm) = (&config.target_modules, runtime) {
        report.add(
            "target-modules-form",
            "target_modules",
            "patterns are not read by every version",
            EXPORT,
        );
    }
    if runtime == Runtime::Mistralrs {
        for (key, is_set) in [
            ("layers_to_transform", config.layers_to_transform.is_some()),
            ("exclude_modules", config.exclude_modules.is_some()),
        ] {
            if is_set {
                report.add(
                    "target-modules-form",
                    key,
                    "is ignored, so modules without tensors fail to load",
                    EXPORT,
                );
            }
        }
    }
}

/// mistral.rs 0.8.1 matches names anywhere in a path and demands tensors for every hit; 0.9 demands them at the end.
fn check_coverage(adapter: &Adapter, base: &ModelFiles, report: &mut Report<'_>) {
    let TargetModules::List(names) = &adapter.config.target_modules else {
        return;
    };
    let anywhere = report.runtime == Runtime::Mistralrs;
    for module in base.linear_modules() {
        let is_hit = names.iter().any(|name| {
            if anywhere {
                module.name.contains(name.as_str())
            } else {
                ends_in(&module.name, name)
            }
        });
        let is_site = adapter.sites.iter().any(|site| site.name == module.name);
        if is_hit && !is_site && module.name != OUTPUT_HEAD {
            report.add(
                "uncovered-target",
                &module.name,
                "matched by target_modules, but the adapter has no tensors for it",
                EXPORT,
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures;

    const ALL: [Runtime; 5] = [
        Runtime::Mistralrs,
        Runtime::Mistralrs09,
        Runtime::Vllm,
        Runtime::LlamaCpp,
        Runtime::Peft,
    ];

    fn codes(adapter: &Adapter, runtime: Runtime) -> Vec<&'static str> {
        let problems = validate(adapter, None, &[runtime]).expect("float");
        problems.iter().map(|problem| problem.code).collect()
    }

    #[test]
    fn names_lead_back() {
        for runtime in ALL {
            assert_eq!(
                runtime
                    .to_string()
                    .parse::<Runtime>()
                    .expect("its own name"),
                runtime
            );
        }
        assert!("llama".parse::<Runtime>().is_err());
    }

    #[test]
    fn what_write_lora_gives_is_accepted_everywhere() {
        for case in fixtures::cases().iter().filter(|case| !case.must_refuse) {
            let base = ModelFiles::open(&case.model_dir).expect("a model");
            let adapter = Adapter::read_dir(&case.dir).expect("a good adapter");
            let (plain, _) = adapter.to_lora(None).expect("float");
            assert_eq!(
                validate(&plain, Some(&base), &ALL).expect("float"),
                [],
                "{}",
                case.name
            );
            assert_eq!(
                validate(&adapter, Some(&base), &[Runtime::Peft]).expect("float"),
                []
            );
        }
    }

    #[test]
    fn each_runtime_names_what_it_cannot_do() {
        let mut adapter = fixtures::small_adapter(20, true);
        adapter.config.use_rslora = true;
        adapter.config.rank_pattern = [("q_proj".to_owned(), 2)].into();
        adapter.config.alpha_pattern = [("q_proj".to_owned(), 2.0)].into();
        adapter.sites[0].lora_a = adapter.sites[0].lora_a.to_dtype(DType::F64).expect("float");
        assert_eq!(codes(&adapter, Runtime::Peft), [""; 0]);
        assert_eq!(
            codes(&adapter, Runtime::Mistralrs),
            ["rslora", "alpha-pattern", "rank-pattern", "dtype"]
        );
        assert_eq!(
            codes(&adapter, Runtime::Mistralrs09),
            ["monteclora", "alpha-pattern", "rank-pattern", "dtype"]
        );
        assert_eq!(
            codes(&adapter, Runtime::LlamaCpp),
            [
                "monteclora",
                "rslora",
                "alpha-pattern",
                "rank-pattern",
                "dtype"
            ]
        );
        adapter.config.target_modules = TargetModules::AllLinear;
        adapter.config.layers_to_transform = Some(vec![1]);
        let found = codes(&adapter, Runtime::Mistralrs);
        assert_eq!(
            found
                .iter()
                .filter(|code| **code == "target-modules-form")
                .count(),
            2
        );
    }

    #[test]
    fn rank_limits_the_head_and_zero_effect_are_reported() {
        let mut adapter = fixtures::small_adapter(21, false)
            .to_lora(None)
            .expect("float")
            .0;
        let site = &mut adapter.sites[0];
        site.rank = 17;
        site.name = OUTPUT_HEAD.into();
        assert_eq!(codes(&adapter, Runtime::Vllm), ["rank-limit", "lm-head"]);
        assert_eq!(codes(&adapter, Runtime::Mistralrs09), ["lm-head"]);
        adapter.sites.clear();
        assert_eq!(codes(&adapter, Runtime::Peft), ["no-effect"]);
    }
}
