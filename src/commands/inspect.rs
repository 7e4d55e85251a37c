//! `inspect`: shows the content of a model or an adapter.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Result, bail};
use monteclora_converters::{
    AdapterSummary, Beside, GgufFile, ModelFiles, Problem, Problems, SiteSummary, is_gguf,
    summarise,
};
use serde_json::{Value, json};

use super::export::count;
use super::{in_a_line, print, print_json, show, without_escapes};
use crate::cli::InspectArgs;
use crate::hub::{self, HubOptions, is_hub_id};

pub(super) fn run(args: &InspectArgs) -> Result<()> {
    let mut path = &args.path;
    let fetched;
    if let (false, Some(id)) = (path.exists(), path.to_str().filter(|id| is_hub_id(id))) {
        fetched = hub::locate(id, &HubOptions::default())?.dir;
        path = &fetched;
    }
    if !path.exists() {
        bail!(Problem::usage(format!(
            "`{}`: no such file or directory; give an adapter, a model directory, a .gguf file or a Hub id such as org/name",
            path.display()
        )));
    }
    if is_gguf(path) {
        let file = GgufFile::open(path)?;
        let kind = file
            .metadata()
            .get("general.type")
            .and_then(|kind| kind.as_str());
        if kind.is_none_or(|kind| kind == "model") {
            return gguf_model(&file, args.json);
        }
    } else if path.is_dir()
        && !path.join("adapter_config.json").exists()
        && path.join("config.json").exists()
    {
        return model(path, args.json);
    }
    let summary = summarise(path)?;
    show(args.json, &summary, || {
        without_escapes(&table(&summary, args.all))
    })
}

/// Number of sites above which similar sites are grouped.
const LISTED: usize = 24;

/// Sites of the same kind in several layers, which differ only in their values.
struct Alike<'a> {
    /// The name with the first and the last layer, for example `0-29`.
    name: String,
    sites: Vec<&'a SiteSummary>,
}

/// Groups sites of the same kind, in the order of their layers. With `each`, every site is its own group.
fn alike(sites: &[SiteSummary], each: bool) -> Vec<Alike<'_>> {
    let mut sites: Vec<_> = sites.iter().collect();
    sites.sort_by_key(|site| natural(&site.name));
    let mut found: Vec<(String, Alike<'_>)> = Vec::new();
    for site in sites {
        let number = |part: &str| part.parse::<usize>().is_ok();
        let kind = site
            .name
            .split('.')
            .map(|part| if number(part) { "*" } else { part });
        let kind = kind.collect::<Vec<_>>().join(".");
        let shape = (
            site.r,
            site.scaling,
            site.in_features,
            site.out_features,
            &site.dtype,
        );
        let key = match each {
            true => site.name.clone(),
            false => format!("{kind} {shape:?}"),
        };
        match found.iter_mut().find(|(known, _)| *known == key) {
            Some((_, alike)) => alike.sites.push(site),
            None => {
                let name = site.name.clone();
                found.push((
                    key,
                    Alike {
                        name,
                        sites: vec![site],
                    },
                ));
            }
        }
    }
    let named = found.into_iter().map(|(_, mut alike)| {
        if let [first, .., last] = alike.sites.as_slice() {
            let parts = first.name.split('.').zip(last.name.split('.'));
            let parts = parts.map(|(a, b)| {
                if a == b {
                    a.to_owned()
                } else {
                    format!("{a}-{b}")
                }
            });
            alike.name = parts.collect::<Vec<_>>().join(".");
        }
        alike
    });
    named.collect()
}

/// A value, or the least and the largest of several.
fn span(values: impl Iterator<Item = Option<f64>>, digits: usize) -> String {
    let values = values.flatten();
    let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| {
        (low.min(value), high.max(value))
    });
    let (first, last) = (format!("{low:.digits$}"), format!("{high:.digits$}"));
    match low <= high {
        false => "-".to_owned(),
        true if first == last => first,
        true => format!("{first} to {last}"),
    }
}

fn table(summary: &AdapterSummary, all: bool) -> String {
    let mut text = format!(
        "format      {}\nr           {}\nlora_alpha  {}\nsites       {}\nparameters  {}\nbase model  {}\n",
        summary.format,
        summary.r,
        summary.lora_alpha,
        summary.n_sites,
        summary.n_parameters,
        in_a_line(summary.base_model.as_deref().unwrap_or("not recorded"))
    );
    let has_posterior = summary
        .sites
        .iter()
        .any(|site| site.effective_components.is_some());
    let each = all || summary.sites.len() <= LISTED;
    let rows = alike(&summary.sites, each);
    let width = rows.iter().map(|row| row.name.len()).max();
    let width = width.unwrap_or(0).max(4);
    let (wide, digits) = if each { (9, 4) } else { (14, 2) };
    let mut line = |columns: [&str; 8], posterior: [&str; 2]| {
        let [name, r, scaling, size, dtype, a, b, delta] = columns;
        text.push_str(&format!(
            "\n{name:<width$} {r:>4} {scaling:>8} {size:>13} {dtype:>5} {a:>wide$} {b:>wide$} {delta:>wide$}"
        ));
        if has_posterior {
            text.push_str(&format!(" {:>14} {:>14}", posterior[0], posterior[1]));
        }
    };
    line(
        [
            "site", "r", "scaling", "in x out", "dtype", "|A|", "|B|", "|delta|",
        ],
        ["noise/signal", "components"],
    );
    for row in &rows {
        let Some(site) = row.sites.first() else {
            continue;
        };
        let of = |value: &dyn Fn(&SiteSummary) -> Option<f64>, digits| {
            span(row.sites.iter().map(|site| value(site)), digits)
        };
        line(
            [
                &row.name,
                &site.r.to_string(),
                &format!("{:.4}", site.scaling),
                &format!("{} x {}", site.in_features, site.out_features),
                &site.dtype,
                &of(&|site| Some(site.norm_a), digits),
                &of(&|site| Some(site.norm_b), digits),
                &of(&|site| Some(site.norm_delta), digits),
            ],
            [
                &of(&|site| site.noise_to_signal, digits),
                &of(&|site| site.effective_components, 2),
            ],
        );
    }
    if !each {
        text.push_str("\n\none line per kind of module, with the range over its layers; --all lists every module");
    }
    if has_posterior {
        text.push_str(
            "\n\nnoise/signal: standard deviation of the perturbation of A over the root mean square of A\n\
             components: effective number of mixture components, 1 / E|w|^2",
        );
    }
    if let Some(beside) = &summary.beside {
        text.push_str(&listing(beside));
    }
    if !summary.problems.is_empty() {
        let list = summary.problems.clone();
        let heading = format!("{} worth knowing", count(list.len(), "thing"));
        text.push_str(&format!("\n\n{}", Problems::under(heading, list)));
    }
    text
}

/// The lines of a report about the other files in the adapter's directory.
pub(super) fn listing(beside: &Beside) -> String {
    let mut text = String::new();
    let names = beside.carried.names();
    if !names.is_empty() {
        text.push_str(&format!(
            "\n\nbeside it, carried along by collapse, convert and merge: {}",
            names.join(", ")
        ));
    }
    if let Some(line) = beside.left_out_line() {
        text.push_str(&format!("\n\nbeside it, not read: {line}"));
    }
    text
}

/// Sort key that places layer 2 before layer 10.
fn natural(name: &str) -> Vec<(usize, &str)> {
    name.split('.')
        .map(|part| (part.parse().unwrap_or(usize::MAX), part))
        .collect()
}

/// The description of a model, from a directory or a GGUF file.
struct Model {
    model_type: Value,
    layers: Value,
    hidden: Value,
    vocabulary: Value,
    n_parameters: usize,
    dtypes: BTreeSet<String>,
    n_files: usize,
    quantization: Option<String>,
    tied: bool,
    sites: Vec<(String, usize, usize)>,
}

impl Model {
    fn print(&self, json: bool) -> Result<()> {
        if json {
            let sites: Vec<_> = self
                .sites
                .iter()
                .map(|(name, n_in, n_out)| json!({"name": name, "in_features": n_in, "out_features": n_out}))
                .collect();
            return print_json(&json!({
                "format": "model",
                "model_type": self.model_type,
                "n_parameters": self.n_parameters,
                "dtypes": self.dtypes,
                "quantization": self.quantization,
                "tie_word_embeddings": self.tied,
                "n_sites": self.sites.len(),
                "sites": sites,
                "problems": [],
            }));
        }
        let dtypes: Vec<&str> = self.dtypes.iter().map(String::as_str).collect();
        print(&format!(
            "format      model\nmodel type  {}\nlayers      {}\nhidden      {}\nvocabulary  {}\nparameters  {}\ndtypes      {}\nfiles       {}\nquantised   {}\nlinear      {} modules that can carry an adapter",
            self.model_type.as_str().unwrap_or("?"),
            self.layers,
            self.hidden,
            self.vocabulary,
            self.n_parameters,
            dtypes.join(", "),
            self.n_files,
            self.quantization.as_deref().unwrap_or("no"),
            self.sites.len()
        ))
    }
}

fn model(path: &Path, json: bool) -> Result<()> {
    let files = ModelFiles::open(path)?;
    let family = files.family();
    let value = |key: &str| files.decoder_key(key).cloned().unwrap_or_default();
    let shapes = || files.names().filter_map(|name| files.info(name));
    Model {
        model_type: files
            .config()
            .get("model_type")
            .cloned()
            .unwrap_or_default(),
        layers: value("num_hidden_layers"),
        hidden: value("hidden_size"),
        vocabulary: value("vocab_size"),
        n_parameters: shapes()
            .map(|(_, shape)| shape.iter().product::<usize>())
            .sum(),
        dtypes: shapes().map(|(dtype, _)| dtype.to_string()).collect(),
        n_files: files.files().len(),
        quantization: files.quantization(),
        tied: files.ties_embeddings(),
        sites: files
            .linear_modules()
            .into_iter()
            .filter(|module| !family.is_some_and(|family| family.is_in_mixture(&module.name)))
            .map(|module| (module.name, module.in_features, module.out_features))
            .collect(),
    }
    .print(json)
}

/// Describes a base model in one GGUF file. Sites have llama.cpp's names.
fn gguf_model(file: &GgufFile, json: bool) -> Result<()> {
    let text = |key: &str| file.metadata().get(key).and_then(|value| value.as_str());
    let architecture = text("general.architecture").unwrap_or_default();
    let number = |key: &str| {
        let value = file.metadata().get(&format!("{architecture}.{key}"));
        json!(value.and_then(|value| value.as_u64()))
    };
    let tensors = || {
        file.names()
            .filter_map(|name| Some((name, file.tensor(name)?)))
    };
    let vocabulary = file.tensor("token_embd.weight");
    Model {
        model_type: json!(architecture),
        layers: number("block_count"),
        hidden: number("embedding_length"),
        vocabulary: json!(vocabulary.and_then(|tensor| tensor.shape.last().copied())),
        n_parameters: tensors()
            .map(|(_, tensor)| tensor.shape.iter().product::<usize>())
            .sum(),
        dtypes: tensors()
            .map(|(_, tensor)| ggml_name(tensor.ggml_type))
            .collect(),
        n_files: 1,
        quantization: tensors()
            .any(|(_, tensor)| !matches!(tensor.ggml_type, 0 | 1 | 30))
            .then(|| "gguf".to_owned()),
        tied: file.tensor("output.weight").is_none(),
        sites: tensors()
            .filter_map(|(name, tensor)| match tensor.shape[..] {
                [n_in, n_out] if name.starts_with("blk.") || name == "output.weight" => {
                    Some((name.trim_end_matches(".weight").to_owned(), n_in, n_out))
                }
                _ => None,
            })
            .collect(),
    }
    .print(json)
}

/// ggml's name of an element type.
fn ggml_name(ggml_type: u32) -> String {
    const NAMES: [(u32, &str); 14] = [
        (0, "F32"),
        (1, "F16"),
        (2, "Q4_0"),
        (3, "Q4_1"),
        (6, "Q5_0"),
        (7, "Q5_1"),
        (8, "Q8_0"),
        (10, "Q2_K"),
        (11, "Q3_K"),
        (12, "Q4_K"),
        (13, "Q5_K"),
        (14, "Q6_K"),
        (15, "Q8_K"),
        (30, "BF16"),
    ];
    let known = NAMES.iter().find(|(number, _)| *number == ggml_type);
    known.map_or_else(
        || format!("ggml type {ggml_type}"),
        |(_, name)| (*name).to_owned(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_modules_of_one_kind_are_one_line() {
        let site = |layer: usize, leaf: &str| SiteSummary {
            name: format!("model.layers.{layer}.{leaf}"),
            r: 8,
            alpha: 16.0,
            scaling: 2.0,
            in_features: 4,
            out_features: 4,
            dtype: "F32".to_owned(),
            norm_a: 1.0 + layer as f64,
            norm_b: 0.5,
            norm_delta: 0.25,
            noise_to_signal: None,
            effective_components: None,
        };
        let sites = (0..20).flat_map(|layer| ["q_proj", "v_proj"].map(|leaf| site(layer, leaf)));
        let sites: Vec<SiteSummary> = sites.collect();
        let listed = alike(&sites, false);
        let names: Vec<&str> = listed.iter().map(|row| row.name.as_str()).collect();
        assert_eq!(
            names,
            ["model.layers.0-19.q_proj", "model.layers.0-19.v_proj"]
        );
        let norms = |row: &Alike<'_>| span(row.sites.iter().map(|site| Some(site.norm_a)), 2);
        assert_eq!(norms(&listed[0]), "1.00 to 20.00");
        assert_eq!(alike(&sites, true).len(), 40);
    }
}
