//! `inspect`: what a model or adapter holds.

use std::path::Path;

use anyhow::Result;
use monteclora_converters::{Adapter, AdapterSummary, ModelFiles};
use serde_json::json;

use super::{Usage, print, print_json};
use crate::cli::InspectArgs;

pub(super) fn run(args: &InspectArgs) -> Result<()> {
    let path = &args.path;
    if !path.exists() {
        return Err(Usage(format!(
            "`{}`: no such file or directory; give an adapter or model directory",
            path.display()
        ))
        .into());
    }
    let is_adapter = path.is_file()
        || path.join("adapter_config.json").exists()
        || !path.join("config.json").exists();
    if !is_adapter {
        return model(path, args.json);
    }
    let summary = Adapter::read(path)?.summary()?;
    if args.json {
        return print_json(&summary);
    }
    print(&table(&summary))
}

fn table(summary: &AdapterSummary) -> String {
    let mut text = format!(
        "format      {}\nr           {}\nlora_alpha  {}\nsites       {}\nparameters  {}\nbase model  {}\n",
        summary.format,
        summary.r,
        summary.lora_alpha,
        summary.n_sites,
        summary.n_parameters,
        summary.base_model.as_deref().unwrap_or("not recorded")
    );
    text.push_str(&format!(
        "\n{:<44} {:>4} {:>8} {:>12} {:>5} {:>10} {:>10} {:>10} {:>8}\n",
        "site", "r", "scaling", "in x out", "dtype", "|A|", "|B|", "|delta|", "noise"
    ));
    for site in &summary.sites {
        let noise = site
            .noise_to_signal
            .map_or("-".to_owned(), |n| format!("{n:.3}"));
        text.push_str(&format!(
            "{:<44} {:>4} {:>8.4} {:>12} {:>5} {:>10.4} {:>10.4} {:>10.4} {:>8}\n",
            site.name,
            site.r,
            site.scaling,
            format!("{} x {}", site.in_features, site.out_features),
            site.dtype,
            site.norm_a,
            site.norm_b,
            site.norm_delta,
            noise
        ));
    }
    for problem in &summary.problems {
        text.push_str(&format!("\n{problem}"));
    }
    text
}

fn model(path: &Path, json: bool) -> Result<()> {
    let files = ModelFiles::open(path)?;
    let config = files.config();
    let n_parameters: usize = files
        .names()
        .filter_map(|name| files.info(name))
        .map(|(_, shape)| shape.iter().product::<usize>())
        .sum();
    let dtypes: std::collections::BTreeSet<String> = files
        .names()
        .filter_map(|name| files.info(name))
        .map(|(dtype, _)| dtype.to_string())
        .collect();
    let value = |key: &str| config.get(key).cloned().unwrap_or_default();
    let modules = files.linear_modules();
    if json {
        let sites: Vec<_> = modules
            .iter()
            .map(|m| json!({ "name": m.name, "in_features": m.in_features, "out_features": m.out_features }))
            .collect();
        return print_json(&json!({
            "format": "model",
            "model_type": value("model_type"),
            "n_parameters": n_parameters,
            "dtypes": dtypes,
            "quantization": files.quantization(),
            "tie_word_embeddings": files.ties_embeddings(),
            "n_sites": modules.len(),
            "sites": sites,
            "problems": [],
        }));
    }
    print(&format!(
        "format      model\nmodel type  {}\nlayers      {}\nhidden      {}\nvocabulary  {}\nparameters  {n_parameters}\ndtypes      {}\nfiles       {}\nlinear      {} modules that can carry an adapter",
        value("model_type").as_str().unwrap_or("?"),
        value("num_hidden_layers"),
        value("hidden_size"),
        value("vocab_size"),
        dtypes.into_iter().collect::<Vec<_>>().join(", "),
        files.files().len(),
        modules.len()
    ))
}
