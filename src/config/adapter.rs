//! What run.toml asks of an adapter, in the terms of PEFT and of the method.

use monteclora_adapters as adapters;
use monteclora_converters::{AdapterConfig, ExcludeModules, MonteCloraSettings, TargetModules};

use super::{LoraConfig, ModuleSelection, MonteCloraConfig, Objective};
use crate::hub::Located;

impl LoraConfig {
    /// PEFT's configuration for what the section asks of `base`.
    pub fn adapter_config(&self, base: &Located) -> AdapterConfig {
        AdapterConfig {
            base_model_name_or_path: Some(base.name.clone()),
            revision: base.revision.clone(),
            r: self.r,
            lora_alpha: self.lora_alpha,
            lora_dropout: self.lora_dropout,
            target_modules: self.target_modules.clone().into(),
            exclude_modules: self
                .exclude_modules
                .clone()
                .map(|selection| match selection {
                    ModuleSelection::AllLinear => ExcludeModules::Regex(".*".to_owned()),
                    ModuleSelection::Names(names) => ExcludeModules::List(names),
                    ModuleSelection::Regex(pattern) => ExcludeModules::Regex(pattern),
                }),
            layers_to_transform: self.layers_to_transform.clone(),
            layers_pattern: (!self.layers_pattern.is_empty()).then(|| self.layers_pattern.clone()),
            rank_pattern: self.rank_pattern.clone(),
            alpha_pattern: self.alpha_pattern.clone(),
            use_rslora: self.use_rslora,
            task_type: Some("CAUSAL_LM".to_owned()),
            inference_mode: true,
            monteclora: self.monteclora.as_ref().map(MonteCloraConfig::settings),
            ..AdapterConfig::default()
        }
    }

    /// The divergences' formulas that `[lora.monteclora]` asks for.
    pub fn objective(&self) -> adapters::Objective {
        match self.monteclora.as_ref().map(|m| m.objective) {
            Some(Objective::Peft) => adapters::Objective::Peft,
            _ => adapters::Objective::Exact,
        }
    }
}

impl MonteCloraConfig {
    /// The method's settings in PEFT's terms; PEFT allocates its noise buffer even for inference, so it is written as 1.
    pub fn settings(&self) -> MonteCloraSettings {
        MonteCloraSettings {
            num_samples: self.num_samples,
            sample_scaler: self.sample_scaler,
            kl_loss_weight: self.kl_loss_weight,
            dirichlet_prior: self.dirichlet_prior,
            use_entropy: self.use_entropy,
            buffer_size: 1,
        }
    }
}

impl From<ModuleSelection> for TargetModules {
    fn from(selection: ModuleSelection) -> Self {
        match selection {
            ModuleSelection::AllLinear => Self::AllLinear,
            ModuleSelection::Names(names) => Self::List(names),
            ModuleSelection::Regex(pattern) => Self::Regex(pattern),
        }
    }
}

impl From<TargetModules> for ModuleSelection {
    fn from(targets: TargetModules) -> Self {
        match targets {
            TargetModules::AllLinear => Self::AllLinear,
            TargetModules::List(names) => Self::Names(names),
            TargetModules::Regex(pattern) => Self::Regex(pattern),
        }
    }
}
