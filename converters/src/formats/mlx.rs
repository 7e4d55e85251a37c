//! mlx-lm adapters: `adapters.safetensors` with transposed factors, and `adapter_config.json` with `lora_parameters`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::{About, Format, Pairs, ReadOptions, Written};
use crate::absent;
use crate::adapter::{Adapter, Site};
use crate::architecture::{Wrapper, ties_embeddings};
use crate::config::{AdapterConfig, TargetModules};
use crate::error::{Error, Result};
use crate::formats::lora::LoraOptions;
use crate::formats::peft::config_write;
use crate::formats::peft::read::{self as peft_read, CONFIG_FILE, non_finite};
use crate::formats::peft::write::replace_files;
use crate::json;
use crate::module_path::{layer_of, one_for_all};
use crate::problem::Problem;
use crate::source::Source;
use crate::targets::OUTPUT_HEAD;
use crate::tensors::safetensors_file::SafetensorsFile;
use crate::validate::cautions::{EXPERTS_FOR_MLX, experts};
use crate::validate::runtime::Runtime;

/// mlx-lm's name of the weight file.
pub(crate) const WEIGHTS_FILE: &str = "adapters.safetensors";
const RETRAIN: &str =
    "only LoRA on linear layers can be converted; fuse it with mlx_lm.fuse, or train without it";

/// mlx-lm's adapter directory.
#[derive(Debug)]
pub(crate) struct Mlx;

impl Format for Mlx {
    fn about(&self) -> &'static About {
        &About {
            name: "mlx",
            aliases: &["mlx-lm", "mlx_lm"],
            label: "mlx-lm directory",
            reads: Some("mlx-lm adapter directory"),
            writes: Some("mlx-lm adapter directory: the posterior mean"),
            file_name: None,
            needs_base: false,
            keeps_posterior: false,
            has_peft_settings: false,
            runtimes: &[Runtime::Mlx],
        }
    }

    fn sniff(&self, path: &Path) -> bool {
        let Ok(source) = Source::of(path) else {
            return false;
        };
        let keys = json::read_object(&source.dir.join(CONFIG_FILE));
        keys.is_ok_and(|keys| claims(&source, &keys))
    }

    fn files(&self, path: &Path) -> Result<Vec<PathBuf>> {
        let source = Source::of(path)?;
        let mut files = vec![source.dir.join(CONFIG_FILE)];
        files.push(source.named.unwrap_or(source.dir.join(WEIGHTS_FILE)));
        Ok(files)
    }

    /// The update is `scale * lora_b^T lora_a^T`; A and B are transposed when their bytes are read.
    fn read(&self, path: &Path, _options: &ReadOptions<'_>) -> Result<Adapter> {
        let source = Source::of(path)?;
        let dir = source.dir.as_path();
        if !dir.join(CONFIG_FILE).exists() {
            return Err(absent::without_config(&source));
        }
        let keys = json::read_object(&dir.join(CONFIG_FILE))?;
        let weights = match &source.named {
            Some(path) => SafetensorsFile::open(path)?,
            None if !dir.join(WEIGHTS_FILE).exists() => {
                return Err(absent::without_weights(dir, WEIGHTS_FILE));
            }
            None => SafetensorsFile::open(dir.join(WEIGHTS_FILE))?,
        };
        let mut problems = Vec::new();
        if let Some(problem) = absent::foreign_adapter(weights.path(), &weights) {
            return Err(Error::refused(dir, vec![problem]));
        }
        let parameters = Parameters::read(&keys, &mut problems);
        let mut pairs = Pairs::default();
        for name in weights.names() {
            let place = match name.rsplit_once('.') {
                Some((module, "lora_a")) => Some((module, 0)),
                Some((module, "lora_b")) => Some((module, 1)),
                _ => None,
            };
            match place {
                Some((module, _)) if is_embedding(module) => {
                    let fix = "train without adapting embeddings";
                    problems.push(Problem::new("embedding", name, "LoRA on an embedding", fix));
                }
                Some((module, idx))
                    if !module.split('.').any(str::is_empty) && !module.contains(['/', '\\']) =>
                {
                    pairs.0.entry(module.to_owned()).or_default()[idx] = weights.get(name);
                }
                _ => {
                    let message = "not understood";
                    problems.push(Problem::new("unknown-tensor", name, message, RETRAIN));
                }
            }
        }
        let mut sites = Vec::new();
        let fix = "save the adapter again";
        for (module, a, b) in pairs.complete(WEIGHTS_FILE, [fix, fix], &mut problems) {
            match (a.shape(), b.shape()) {
                ([_, r_a], [r_b, _]) if *r_a == parameters.rank && r_a == r_b && a.dtype().is_float() && b.dtype().is_float() => {
                    sites.push(Site {
                        name: module,
                        rank: parameters.rank,
                        alpha: parameters.alpha(),
                        scaling: parameters.alpha() / parameters.rank as f64,
                        lora_a: a.transposed()?,
                        lora_b: b.transposed()?,
                        posterior: None,
                        beyond: None,
                        triplets: None,
                    });
                }
                _ => problems.push(Problem::new(
                    "shape",
                    module,
                    format!("expected real lora_a [in, {0}] and lora_b [{0}, out], found {a:?} and {b:?}", parameters.rank),
                    RETRAIN,
                )),
            }
        }
        for site in &mut sites {
            if let Some(wrapper) = Wrapper::with_stored(&site.name) {
                site.name = wrapper.in_memory(&site.name).into_owned();
            }
        }
        problems.extend(non_finite(&sites));
        Error::refuse_any(dir, problems)?;
        let model = keys.get("model").and_then(Value::as_str);
        Ok(Adapter {
            config: AdapterConfig {
                base_model_name_or_path: model.map(str::to_owned),
                r: parameters.rank,
                lora_alpha: parameters.alpha(),
                lora_dropout: parameters.dropout,
                // mlx-lm counts layers from the end, so only the tensors tell which modules are adapted.
                target_modules: TargetModules::List(
                    sites.iter().map(|site| site.name.clone()).collect(),
                ),
                task_type: Some("CAUSAL_LM".into()),
                inference_mode: true,
                ..AdapterConfig::default()
            },
            sites,
            format: "mlx",
            metadata: weights.metadata().clone(),
            notes: Vec::new(),
        })
    }

    /// Writes the posterior mean: one rank, one scale. Modules have their names within a layer, as in mlx-lm, if every
    /// layer carries the same modules; otherwise they have their full paths, which mlx-lm accepts too.
    fn write(
        &self,
        adapter: &Adapter,
        path: &Path,
        options: &LoraOptions,
        base_config: Option<&Map<String, Value>>,
    ) -> Result<Written> {
        let message = "one expert as a module of its own; mlx-lm keeps the experts of a layer in one (switch_mlp), and would not load it";
        let fix = EXPERTS_FOR_MLX;
        let experts = one_for_all("experts", &experts(adapter), message, fix);
        Error::refuse_any(path, experts.into_iter().collect())?;
        let is_tied = base_config.is_some_and(|config| ties_embeddings(config) == Some(true));
        if is_tied && adapter.sites.iter().any(|site| site.name == OUTPUT_HEAD) {
            let message = "is the embedding in this base, and mlx-lm has no such module then: the head would stay unadapted";
            let fix = "merge it (monteclora merge -m BASE -a ADAPTER -o DIR) and convert the model with mlx_lm.convert";
            return Err(Error::refused(
                path,
                vec![Problem::new("lm-head", OUTPUT_HEAD, message, fix)],
            ));
        }
        let (mut plain, mut report) = adapter.to_lora(options.dtype)?;
        report
            .dropped_keys
            .extend(plain.config.described(&["revision", "task_type"]));
        Error::refuse_any(path, renamed(&mut plain.sites, base_config))?;
        let mut metadata = plain.metadata.clone();
        metadata.insert("format".into(), "mlx".into());
        let (keys, num_layers) = keys_of(&plain);
        let config = json!({
            "fine_tune_type": "lora",
            "lora_parameters": {
                "dropout": plain.config.lora_dropout,
                "keys": keys,
                "rank": report.r,
                "scale": report.lora_alpha / report.r as f64,
            },
            "model": plain.config.base_model_name_or_path,
            "num_layers": num_layers,
        });
        let mut tensors = BTreeMap::new();
        for site in &plain.sites {
            tensors.insert(format!("{}.lora_a", site.name), site.lora_a.transposed()?);
            tensors.insert(format!("{}.lora_b", site.name), site.lora_b.transposed()?);
        }
        let text = config_write::to_text(&config);
        replace_files(
            path,
            options,
            (CONFIG_FILE, &text),
            (WEIGHTS_FILE, &tensors),
            &metadata,
        )?;
        Ok(Written {
            what: "mlx-lm adapter",
            report,
            note: Some("A and B are transposed, as mlx-lm stores them"),
        })
    }
}

/// Whether `source` is mlx-lm's by the `keys` of its configuration. Unsloth writes PEFT's keys and mlx-lm's into one
/// file; the weights then decide.
pub(crate) fn claims(source: &Source, keys: &Map<String, Value>) -> bool {
    if !keys.contains_key("lora_parameters") {
        return false;
    }
    if !keys.contains_key("peft_type") {
        return true;
    }
    match &source.named {
        None => {
            source.dir.join(WEIGHTS_FILE).is_file()
                && !source.dir.join(peft_read::WEIGHTS_FILE).is_file()
        }
        Some(path) => SafetensorsFile::open(path)
            .is_ok_and(|file| file.names().any(|name| name.ends_with(".lora_a"))),
    }
}

/// Gives `sites` their names in files, as mlx-lm does, if the decoder is part of a larger model. Returns a problem for
/// modules that mlx-lm does not have.
fn renamed(sites: &mut [Site], base_config: Option<&Map<String, Value>>) -> Vec<Problem> {
    let mut named = sites.iter();
    let by_name = || named.find_map(|site| Wrapper::with_module(&site.name));
    let Some(wrapper) = base_config.map_or_else(by_name, Wrapper::of) else {
        return Vec::new();
    };
    let mut beside = Vec::new();
    for site in sites {
        if wrapper.is_beside(&site.name) {
            beside.push(site.name.clone());
        }
        site.name = wrapper.on_disk(&site.name).into_owned();
    }
    let message = "is for other media than text; mlx-lm has the language model alone";
    let fix = "train on the language model alone, or convert it to PEFT or plain LoRA";
    one_for_all("other-media", &beside, message, fix)
        .into_iter()
        .collect()
}

fn is_embedding(module: &str) -> bool {
    module
        .rsplit('.')
        .next()
        .is_some_and(|leaf| leaf.contains("embed") || matches!(leaf, "wte" | "wpe"))
}

/// Returns `keys` and `num_layers`. mlx-lm matches keys in its last `num_layers` layers by their names within a layer,
/// and in the whole model by full path. Names within a layer are used if the targets are known to cover every layer,
/// because other readers of the format know only those.
fn keys_of(plain: &Adapter) -> (Vec<String>, usize) {
    let mut layers = BTreeSet::new();
    let mut within_layers = BTreeSet::new();
    let mut are_all_layered = true;
    for site in &plain.sites {
        match layer_of(&site.name) {
            Some((_, layer, key)) => {
                layers.insert(layer);
                within_layers.insert(key.to_owned());
            }
            None => are_all_layered = false,
        }
    }
    let means_every_layer = match &plain.config.target_modules {
        TargetModules::List(names) => names.iter().all(|name| !name.contains('.')),
        _ => false,
    };
    let is_product = within_layers.len() * layers.len() == plain.sites.len();
    let keys = if are_all_layered && means_every_layer && is_product {
        within_layers.into_iter().collect()
    } else {
        plain.sites.iter().map(|site| site.name.clone()).collect()
    };
    (keys, layers.len())
}

/// The fields of `lora_parameters`.
struct Parameters {
    rank: usize,
    scale: f64,
    dropout: f64,
}

impl Parameters {
    /// Reads the fields. The other keys of the file describe the training; mlx-lm does not read them when it loads an
    /// adapter.
    fn read(keys: &Map<String, Value>, problems: &mut Vec<Problem>) -> Self {
        let mut parameters = Self {
            rank: 1,
            scale: 1.0,
            dropout: 0.0,
        };
        let mut refuse = |code, key: &str, message: String| {
            problems.push(Problem::new(code, key, message, RETRAIN))
        };
        match keys.get("fine_tune_type").and_then(Value::as_str) {
            None | Some("lora") => {}
            Some(kind) => {
                let code = if kind == "dora" {
                    "dora"
                } else {
                    "fine-tune-type"
                };
                refuse(code, "fine_tune_type", format!("{kind} is not lora"));
            }
        }
        let Some(Value::Object(given)) = keys.get("lora_parameters") else {
            refuse("config-value", "lora_parameters", "missing".into());
            return parameters;
        };
        for key in ["rank", "scale"] {
            if !given.contains_key(key) {
                refuse("config-value", key, "missing in lora_parameters".into());
            }
        }
        let rank = given.get("rank").and_then(Value::as_f64);
        for (key, value) in given {
            if key == "alpha" {
                // If alpha equals the rank, both readings agree.
                if value.as_f64() != rank {
                    let message = format!(
                        "early versions of mlx-lm multiplied scale by alpha / rank, later ones leave alpha ({value}) unread, \
                         so the scale depends on the version that trained it; remove alpha if it was a later one, else set scale \
                         to scale * alpha / rank first"
                    );
                    refuse("ambiguous-scale", key, message);
                }
                continue;
            }
            let number = value.as_f64().filter(|number| number.is_finite());
            let understood = match key.as_str() {
                "rank" => value
                    .as_u64()
                    .and_then(|rank| usize::try_from(rank).ok())
                    .filter(|rank| (1..=1 << 16).contains(rank))
                    .map(|rank| parameters.rank = rank),
                "scale" => number.map(|scale| parameters.scale = scale),
                "dropout" => number
                    .filter(|p| (0.0..=1.0).contains(p))
                    .map(|p| parameters.dropout = p),
                "keys" => Some(()),
                _ => None,
            };
            if understood.is_none() {
                let message = format!("{value} is not understood in lora_parameters");
                refuse("config-value", key, message);
            }
        }
        parameters
    }

    fn alpha(&self) -> f64 {
        self.scale * self.rank as f64
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::fixtures;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn a_trip_keeps_what_plain_lora_can_hold(seed in any::<u64>()) {
            let dir = tempfile::tempdir().expect("temporary directory");
            let (plain, _) = fixtures::small_adapter(seed, true).to_lora(None).expect("float");
            let out = dir.path().join("out");
            Mlx.write(&plain, &out, &LoraOptions::default(), None).expect("written");
            let read = Adapter::read(&out).expect("our own output");
            prop_assert_eq!(read.format, "mlx");
            prop_assert_eq!(&read.sites, &plain.sites);
            prop_assert_eq!(read.config.lora_dropout, plain.config.lora_dropout);
            let again = dir.path().join("again");
            Mlx.write(&read, &again, &LoraOptions::default(), None).expect("written");
            prop_assert_eq!(
                std::fs::read(out.join(WEIGHTS_FILE)).expect("readable"),
                std::fs::read(again.join(WEIGHTS_FILE)).expect("readable")
            );
        }
    }

    #[test]
    fn fixtures_keep_their_updates() {
        for case in &fixtures::low_rank() {
            let dir = tempfile::tempdir().expect("temporary directory");
            let adapter = Adapter::read_dir(&case.dir).expect("a good adapter");
            let out = dir.path().join("out");
            Mlx.write(&adapter, &out, &LoraOptions::default(), None)
                .expect("written");
            fixtures::assert_deltas(case, &Adapter::read(&out).expect("our own output"));
        }
    }

    #[test]
    fn keys_are_named_within_a_layer_if_all_layers_are_meant() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let mut adapter = fixtures::small_adapter(2, false);
        let keys = |adapter: &Adapter, name: &str| {
            let out = dir.path().join(name);
            Mlx.write(adapter, &out, &LoraOptions::default(), None)
                .expect("written");
            let keys = json::read_object(&out.join(CONFIG_FILE)).expect("our own output");
            (
                keys["lora_parameters"]["keys"].clone(),
                keys["num_layers"].clone(),
            )
        };
        let all = keys(&adapter, "all");
        assert_eq!(
            all,
            (json!(["self_attn.k_proj", "self_attn.q_proj"]), json!(2))
        );
        adapter.config.layers_to_transform = Some(vec![0, 1]);
        let (some, _) = keys(&adapter, "some");
        assert_eq!(some[0], "model.layers.0.self_attn.k_proj");
    }

    #[test]
    fn embeddings_are_refused() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let out = dir.path().join("out");
        let mut adapter = fixtures::small_adapter(3, false);
        adapter.sites[0].name = "model.embed_tokens".into();
        Mlx.write(&adapter, &out, &LoraOptions::default(), None)
            .expect("written");
        let error = Adapter::read(&out).expect_err("an embedding");
        assert!(
            error
                .problems()
                .iter()
                .all(|problem| problem.code == "embedding")
        );
    }

    #[test]
    fn an_alpha_that_would_change_the_scale_in_some_versions_is_refused() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let out = dir.path().join("out");
        Mlx.write(
            &fixtures::small_adapter(4, false),
            &out,
            &LoraOptions::default(),
            None,
        )
        .expect("written");
        let path = out.join(CONFIG_FILE);
        let mut config = Value::Object(json::read_object(&path).expect("our own output"));
        let rank = config["lora_parameters"]["rank"].as_u64().expect("a rank");
        config["lora_parameters"]["alpha"] = json!(rank);
        std::fs::write(&path, config.to_string()).expect("writable");
        assert!(Adapter::read(&out).is_ok());
        config["lora_parameters"]["alpha"] = json!(rank + 1);
        std::fs::write(&path, config.to_string()).expect("writable");
        let error = Adapter::read(&out).expect_err("two readings");
        assert_eq!(error.problems()[0].code, "ambiguous-scale");
    }

    #[test]
    fn what_is_not_lora_is_refused() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let out = dir.path().join("out");
        Mlx.write(
            &fixtures::small_adapter(1, false),
            &out,
            &LoraOptions::default(),
            None,
        )
        .expect("written");
        let config = json!({"fine_tune_type": "dora", "lora_parameters": {"rank": 99, "alpha": 3}});
        std::fs::write(out.join(CONFIG_FILE), config.to_string()).expect("writable");
        let error = Adapter::read(&out).expect_err("spoilt");
        let codes: Vec<&str> = error
            .problems()
            .iter()
            .map(|problem| problem.code)
            .collect();
        assert_eq!(
            codes,
            [
                "dora",
                "config-value",
                "ambiguous-scale",
                "shape",
                "shape",
                "shape",
                "shape"
            ]
        );
    }
}
