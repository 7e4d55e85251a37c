//! What an adapter that can be read depends on, as far as its own files show it.

use std::collections::BTreeMap;

use crate::adapter::Adapter;
use crate::module_path::{base_of, one_for_all};
use crate::problem::Problem;
use crate::validate::runtime::Runtime;

/// Warnings: what reading left out, the kind of base that names belong to where none `is_compared`, and experts.
pub(super) fn of(adapter: &Adapter, is_compared: bool, runtimes: &[Runtime]) -> Vec<Problem> {
    let notes = adapter.notes.iter();
    let mut warnings: Vec<Problem> = notes.map(|note| Problem::sentence("note", note)).collect();
    if !is_compared {
        let mut by_base: BTreeMap<&str, Vec<String>> = BTreeMap::new();
        for site in &adapter.sites {
            if let Some(base) = base_of(&site.name) {
                by_base.entry(base).or_default().push(site.name.clone());
            }
        }
        let of_base = by_base.iter().filter_map(|(base, names)| {
            let message = format!("a name in {base}; in a causal language model alone no module has it, and nothing would be loaded");
            let fix = "give the base with -m to compare the names";
            one_for_all("other-model-names", names, message, fix)
        });
        warnings.extend(of_base);
    }
    let experts = experts(adapter);
    if runtimes.contains(&Runtime::Peft) {
        let message = "one expert as a module of its own, as transformers 4 has it; transformers 5 keeps the experts of a layer in one \
             parameter, where PEFT finds no such module";
        warnings.extend(one_for_all(
            "experts",
            &experts,
            message,
            "load it with transformers 4",
        ));
    }
    warnings
}

/// Names that no model has which the adapter says it is for.
pub(super) fn of_no_model(adapter: &Adapter) -> Option<Problem> {
    if adapter.config.task_type.as_deref() != Some("CAUSAL_LM") {
        return None;
    }
    let names = adapter.sites.iter().map(|site| site.name.clone());
    let bare: Vec<String> = names.filter(|name| name.starts_with("layers.")).collect();
    let message = "task_type is CAUSAL_LM, and no causal language model has modules of such names: `model.` is missing in front";
    let fix = "train on the model with its head (AutoModelForCausalLM), or give the base with -m to compare the names";
    one_for_all("unknown-site", &bare, message, fix)
}

/// What to do about single experts for mlx-lm, which keeps those of a layer in one module.
pub(crate) const EXPERTS_FOR_MLX: &str =
    "convert it to PEFT or plain LoRA, or merge it and convert the model with mlx_lm.convert";

/// The modules that are one expert of a layer.
pub(crate) fn experts(adapter: &Adapter) -> Vec<String> {
    let names = adapter.sites.iter().map(|site| &site.name);
    names
        .filter(|name| {
            let mut segments = name.split('.').skip_while(|segment| *segment != "experts");
            segments
                .nth(1)
                .is_some_and(|next| next.parse::<usize>().is_ok())
        })
        .cloned()
        .collect()
}
