//! What run.toml asks of an adapter, in the terms of PEFT and of the method.

use std::sync::Arc;

use monteclora_adapters::methods::{self, Method};
use monteclora_converters::{AdapterConfig, ExcludeModules, TargetModules};

use super::{LoraConfig, ModuleSelection};
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
            monteclora: self.monteclora.as_ref().map(Into::into),
            ..AdapterConfig::default()
        }
    }

    /// What is trained, with the settings of its section.
    ///
    /// # Errors
    /// Settings that the method does not take.
    pub fn method(&self) -> anyhow::Result<Arc<dyn Method>> {
        let section = serde_json::to_value(self)?;
        let kind = methods::find(self.method.0)?;
        Ok((kind.new)(&section[kind.section().as_str()])?)
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

impl From<ExcludeModules> for ModuleSelection {
    fn from(excluded: ExcludeModules) -> Self {
        match excluded {
            ExcludeModules::List(names) => Self::Names(names),
            ExcludeModules::Regex(pattern) => Self::Regex(pattern),
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
