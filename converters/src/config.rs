//! The adapter's configuration, `adapter_config.json`, resolved.

use fancy_regex::{Captures, Regex, RegexBuilder};
use indexmap::IndexMap;
use serde::{Serialize, Serializer};
use serde_json::{Map, Value};

use crate::adapter::Site;
use crate::error::{Error, Result};
use crate::site_pattern::SitePatterns;

/// Backtracking steps after which a pattern is given up: patterns come from files that may be hostile.
const BACKTRACK_LIMIT: usize = 100_000;

/// Which modules of the base carry the adapter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum TargetModules {
    /// Module names: each is a full path or the end of one, after a dot.
    List(Vec<String>),
    /// One regular expression (Python syntax) that must match the whole path.
    Regex(String),
    /// Every linear module but the output head.
    #[serde(serialize_with = "all_linear")]
    AllLinear,
}

fn all_linear<S: Serializer>(serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str("all-linear")
}

/// Modules that are left out of the targets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum ExcludeModules {
    /// Module names: each is a full path or the end of one, after a dot.
    List(Vec<String>),
    /// One regular expression (Python syntax) that must match the whole path.
    Regex(String),
}

/// The hyper-parameters of MonteCLoRA, PEFT's `monteclora_config`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MonteCloraSettings {
    /// Number of Gaussian draws that are averaged, N. At least 1.
    pub num_samples: usize,
    /// Factor on the noise (the paper's epsilon), applied once. At least 0.
    pub sample_scaler: f64,
    /// Weight of the KL terms in the loss. At least 0.
    pub kl_loss_weight: f64,
    /// Concentration of the symmetric Dirichlet prior. Above 0.
    pub dirichlet_prior: f64,
    /// Whether the sum of squared mixture weights is added to the loss.
    pub use_entropy: bool,
    /// Draws that PEFT keeps in advance; no effect on the result. At least 1.
    pub buffer_size: usize,
}

impl MonteCloraSettings {
    /// The buffer size to write for adapters trained here: PEFT's own default reserves 150 full draws a module, even
    /// for inference.
    pub const EXPORT_BUFFER_SIZE: usize = 1;
}

impl Default for MonteCloraSettings {
    /// PEFT's defaults, which hold for absent keys.
    fn default() -> Self {
        Self {
            num_samples: 8,
            sample_scaler: 1e-4,
            kl_loss_weight: 1e-5,
            dirichlet_prior: 0.1,
            use_entropy: false,
            buffer_size: 150,
        }
    }
}

/// What the tensors of an adapter are, `peft_type`. PEFT has the first two.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum PeftType {
    /// A and B, with MonteCLoRA's sampler or DoRA's magnitude.
    #[default]
    Lora,
    /// A, B and singular values.
    AdaLora,
    /// Scale and shift of the output.
    Ssf,
    /// Single entries of the weights.
    Sparse,
}

impl PeftType {
    /// Every type that is read.
    pub const ALL: [Self; 4] = [Self::Lora, Self::AdaLora, Self::Ssf, Self::Sparse];

    /// Its name in `adapter_config.json`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Lora => "LORA",
            Self::AdaLora => "ADALORA",
            Self::Ssf => "SSF",
            Self::Sparse => "SPARSE",
        }
    }
}

/// The settings of AdaLoRA, by PEFT's names.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AdaLoraSettings {
    /// Rank at the start. At least 1.
    pub init_r: usize,
    /// Mean rank at the end.
    pub target_r: usize,
    /// Steps before the first pruning.
    pub tinit: u64,
    /// Steps at the end without pruning.
    pub tfinal: u64,
    /// Steps between prunings.
    #[serde(rename = "deltaT")]
    pub delta_t: u64,
    /// Decay of the average of the sensitivities.
    pub beta1: f64,
    /// Decay of the average of their uncertainties.
    pub beta2: f64,
    /// Weight of the orthogonality in the loss.
    pub orth_reg_weight: f64,
    /// Steps of the run.
    pub total_step: Option<u64>,
}

impl Default for AdaLoraSettings {
    /// PEFT's defaults, which hold for absent keys.
    fn default() -> Self {
        Self {
            init_r: 12,
            target_r: 8,
            tinit: 0,
            tfinal: 0,
            delta_t: 1,
            beta1: 0.85,
            beta2: 0.85,
            orth_reg_weight: 0.5,
            total_step: None,
        }
    }
}

/// What `adapter_config.json` says, checked. [`Default`] gives PEFT's defaults with no target.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AdapterConfig {
    /// Path or Hub id of the base model.
    pub base_model_name_or_path: Option<String>,
    /// Revision of the base model.
    pub revision: Option<String>,
    /// Rank of every site that `rank_pattern` does not name. At least 1.
    pub r: usize,
    /// Alpha of every site that `alpha_pattern` does not name.
    pub lora_alpha: f64,
    /// Dropout on the input of A while training, 0 to 1.
    pub lora_dropout: f64,
    /// The sites.
    pub target_modules: TargetModules,
    /// Modules that are not sites although they are targets.
    pub exclude_modules: Option<ExcludeModules>,
    /// Layer numbers to which a list of targets is confined.
    pub layers_to_transform: Option<Vec<usize>>,
    /// Name of the module list that `layers_to_transform` counts in, such as `layers`; regular expressions.
    pub layers_pattern: Option<Vec<String>>,
    /// Ranks of sites whose path ends in a key; keys are regular expressions, the first that matches wins.
    pub rank_pattern: IndexMap<String, usize>,
    /// Alphas of sites whose path ends in a key, as for `rank_pattern`.
    pub alpha_pattern: IndexMap<String, f64>,
    /// Whether the scaling is alpha / sqrt(r) instead of alpha / r.
    pub use_rslora: bool,
    /// What the tensors are.
    pub peft_type: PeftType,
    /// Whether every row of an updated weight has a magnitude of its own (DoRA).
    pub use_dora: bool,
    /// AdaLoRA's settings; `None` for other types.
    #[serde(skip)]
    pub adalora: Option<AdaLoraSettings>,
    /// PEFT's task type, such as `CAUSAL_LM`.
    pub task_type: Option<String>,
    /// PEFT's note that the adapter was saved for inference.
    pub inference_mode: bool,
    /// MonteCLoRA's settings; `None` for a plain LoRA.
    #[serde(rename = "monteclora_config")]
    pub monteclora: Option<MonteCloraSettings>,
    /// Keys without effect on the weights, kept as they were.
    #[serde(skip)]
    pub other: Map<String, Value>,
}

impl Default for AdapterConfig {
    fn default() -> Self {
        Self {
            base_model_name_or_path: None,
            revision: None,
            r: 8,
            lora_alpha: 8.0,
            lora_dropout: 0.0,
            target_modules: TargetModules::List(Vec::new()),
            exclude_modules: None,
            layers_to_transform: None,
            layers_pattern: None,
            rank_pattern: IndexMap::new(),
            alpha_pattern: IndexMap::new(),
            use_rslora: false,
            peft_type: PeftType::Lora,
            use_dora: false,
            adalora: None,
            task_type: None,
            inference_mode: false,
            monteclora: None,
            other: Map::new(),
        }
    }
}

impl AdapterConfig {
    /// What a PEFT directory with this configuration holds: `peft-monteclora` or `peft-lora`.
    pub fn peft_format(&self) -> &'static str {
        match (self.peft_type, &self.monteclora) {
            (PeftType::AdaLora, _) => "peft-adalora",
            (PeftType::Ssf, _) => "peft-ssf",
            (PeftType::Sparse, _) => "peft-sparse",
            (PeftType::Lora, Some(_)) => "peft-monteclora",
            (PeftType::Lora, None) if self.use_dora => "peft-dora",
            (PeftType::Lora, None) => "peft-lora",
        }
    }

    /// Rank of a module.
    ///
    /// # Errors
    /// If a key of `rank_pattern` is no regular expression or backtracks without end.
    pub fn rank_for(&self, module: &str) -> Result<usize> {
        let patterns = SitePatterns::new("rank_pattern", &self.rank_pattern)?;
        Ok(patterns.find(module)?.unwrap_or(self.r))
    }

    /// Alpha of a module.
    ///
    /// # Errors
    /// If a key of `alpha_pattern` is no regular expression or backtracks without end.
    pub fn alpha_for(&self, module: &str) -> Result<f64> {
        let patterns = SitePatterns::new("alpha_pattern", &self.alpha_pattern)?;
        Ok(patterns.find(module)?.unwrap_or(self.lora_alpha))
    }

    /// Factor on B A of a module: alpha / r, or alpha / sqrt(r) with `use_rslora`.
    ///
    /// # Errors
    /// As [`Self::rank_for`] and [`Self::alpha_for`].
    pub fn scaling_for(&self, module: &str) -> Result<f64> {
        Ok(self.scaling(self.alpha_for(module)?, self.rank_for(module)?))
    }

    /// Says rank and alpha of every site by its whole name.
    pub(crate) fn describe_ranks(&mut self, sites: &[Site]) {
        let r = sites.iter().map(|site| site.rank).max();
        let first = sites.iter().find(|site| Some(site.rank) == r);
        self.use_rslora = false;
        self.r = r.unwrap_or(1);
        self.lora_alpha = first.map_or(1.0, |site| site.alpha);
        let key = |site: &Site| site.name.replace('.', "\\.");
        let others = sites.iter().filter(|site| site.rank != self.r);
        self.rank_pattern = others.map(|site| (key(site), site.rank)).collect();
        let others = sites.iter().filter(|site| site.alpha != self.lora_alpha);
        self.alpha_pattern = others.map(|site| (key(site), site.alpha)).collect();
    }

    pub(crate) fn scaling(&self, alpha: f64, rank: usize) -> f64 {
        if self.use_rslora {
            alpha / (rank as f64).sqrt()
        } else {
            alpha / rank as f64
        }
    }
}

/// A regular expression made from what the user wrote, with bounded backtracking.
pub(crate) struct Pattern<'a> {
    setting: &'static str,
    text: &'a str,
    regex: Regex,
}

impl<'a> Pattern<'a> {
    /// `expression`, made from the `text` of `setting`.
    pub(crate) fn new(setting: &'static str, text: &'a str, expression: &str) -> Result<Self> {
        let regex = RegexBuilder::new(expression)
            .backtrack_limit(BACKTRACK_LIMIT)
            .delegate_size_limit(1 << 20)
            .build()
            .map_err(|error| {
                let why = "is not a regular expression that can be used";
                Error::setting(setting, format!("`{text}` {why}: {error}"))
            })?;
        Ok(Self {
            setting,
            text,
            regex,
        })
    }

    pub(crate) fn is_match(&self, module: &str) -> Result<bool> {
        self.answer(module, self.regex.is_match(module))
    }

    pub(crate) fn captures<'m>(&self, module: &'m str) -> Result<Option<Captures<'m>>> {
        self.answer(module, self.regex.captures(module))
    }

    fn answer<T>(&self, module: &str, answer: Result<T, fancy_regex::Error>) -> Result<T> {
        answer.map_err(|error| {
            let message = format!(
                "`{}` cannot be matched against `{module}`: {error}",
                self.text
            );
            Error::setting(self.setting, message)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_ranks(ranks: &[(&str, usize)]) -> AdapterConfig {
        AdapterConfig {
            r: 8,
            lora_alpha: 16.0,
            rank_pattern: ranks
                .iter()
                .map(|(key, rank)| ((*key).to_owned(), *rank))
                .collect(),
            ..AdapterConfig::default()
        }
    }

    #[test]
    fn pattern_keys_match_whole_components_and_the_first_wins() {
        let config = with_ranks(&[("q_proj", 2), (".*attn.q_proj", 3), ("layers\\.1\\..*", 4)]);
        let rank = |module| config.rank_for(module).expect("valid patterns");
        assert_eq!(rank("model.layers.1.self_attn.q_proj"), 2);
        assert_eq!(rank("q_proj"), 2);
        assert_eq!(rank("model.layers.1.mlp.up_proj"), 4);
        assert_eq!(rank("model.layers.11.mlp.up_proj"), 8);
        assert_eq!(rank("model.layers.0.self_attn.xq_proj"), 8);
        assert_eq!(rank("model.layers.0.self_attn.q_proj.x"), 8);
        let anchored = with_ranks(&[("^model.layers.0.q_proj", 5)]);
        assert_eq!(
            anchored.rank_for("model.layers.0.q_proj").expect("valid"),
            5
        );
        assert_eq!(
            anchored.rank_for("x.model.layers.0.q_proj").expect("valid"),
            8
        );
    }

    #[test]
    fn bad_and_exploding_patterns_are_errors() {
        assert!(with_ranks(&[("(", 1)]).rank_for("a").is_err());
        let exploding = with_ranks(&[(r"(?:(x+)\3?)+y", 1)]);
        assert!(exploding.rank_for(&"x".repeat(64)).is_err());
    }

    #[test]
    fn rslora_divides_by_the_root_of_the_rank() {
        let mut config = with_ranks(&[("k_proj", 4)]);
        assert_eq!(config.scaling_for("k_proj").expect("valid"), 4.0);
        config.use_rslora = true;
        assert_eq!(config.scaling_for("k_proj").expect("valid"), 8.0);
    }
}
