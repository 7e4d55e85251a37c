//! A Hugging Face model directory: its weights and its configuration, headers read, weights mapped.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::architecture::{self, Family, Wrapper};
use crate::error::Result;
use crate::json;
use crate::targets::{LinearModule, OUTPUT_HEAD};
use crate::tensors::dtype::DType;
use crate::tensors::safetensors_file::SafetensorsFile;
use crate::tensors::tensor::Tensor;

mod beside;
mod check;
pub(crate) mod instead;
mod mlx;
mod names;
mod quantised;
mod weights;

use weights::Weights;

pub(crate) use mlx::is_read_in_blocks;
pub(crate) use quantised::{FIX as QUANTISED_FIX, declared as declared_quantization};

/// The output head's weight, where it is not the embedding.
pub(crate) const HEAD: &str = "lm_head.weight";

/// A model in a directory: `model.safetensors`, or shards with or without `model.safetensors.index.json`; or a directory that
/// [`refer_to_gguf`](crate::gguf_base::refer_to_gguf) made.
///
/// Tensors go by the names of transformers' modules, which in the files of some models have others; see [`Wrapper`].
#[derive(Debug, Clone)]
pub struct ModelFiles {
    dir: PathBuf,
    weights: Weights,
    config: Map<String, Value>,
}

impl ModelFiles {
    /// Opens the model in `dir`: reads `config.json` and every header.
    ///
    /// # Errors
    /// `not-found` if the directory, its `config.json`, its weights or a shard is missing;
    /// `malformed` if a file is not what it claims to be or a tensor is stored twice.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        instead::require_dir(dir)?;
        let config = Self::read_config(dir)?;
        Ok(Self {
            dir: dir.to_path_buf(),
            weights: Weights::open(dir, &config)?,
            config,
        })
    }

    /// The `config.json` of the model in `dir`; its weights need not be there.
    ///
    /// # Errors
    /// `not-found` if it is missing; `json` and `malformed` if it is not what it claims to be.
    pub fn read_config(dir: impl AsRef<Path>) -> Result<Map<String, Value>> {
        let path = dir.as_ref().join("config.json");
        if !path.exists() {
            return Err(instead::of_config(dir.as_ref()));
        }
        json::read_object(&path)
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The weight files, in shard order.
    pub fn files(&self) -> &[PathBuf] {
        self.weights.paths()
    }

    /// The opened weight files, in the order of [`Self::files`]; none where weights are in [blocks](Self::blocks).
    pub fn shards(&self) -> &[SafetensorsFile] {
        self.weights.shards()
    }

    /// The path of `config.json`.
    pub fn config_path(&self) -> PathBuf {
        self.dir.join("config.json")
    }

    /// The contents of `config.json`.
    pub fn config(&self) -> &Map<String, Value> {
        &self.config
    }

    /// The decoder's `key` of `config.json`, which a model for several media has in `text_config`.
    pub fn decoder_key(&self, key: &str) -> Option<&Value> {
        architecture::entry(&self.config, key).1
    }

    /// What blocks of quantised values matrices are in, such as `GGUF, Q4_K and Q6_K`; none where they are stored as they are.
    /// Such values are given as F32, and decoded when they are asked for.
    pub fn blocks(&self) -> Option<String> {
        self.weights.blocks()
    }

    /// The GGUF file that holds the weights, where the directory only refers to it.
    pub fn gguf(&self) -> Option<&Path> {
        self.weights.gguf()
    }

    /// What the user knows as the model: the GGUF file, or the directory.
    pub fn place(&self) -> &Path {
        self.gguf().unwrap_or(&self.dir)
    }

    /// Tensor names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.weights.names()
    }

    /// The tensor called `name`; its data stays mapped.
    pub fn get(&self, name: &str) -> Option<Tensor> {
        self.weights.get(name)
    }

    /// Element type and shape of the tensor called `name`.
    pub fn info(&self, name: &str) -> Option<(DType, &[usize])> {
        self.weights.info(name)
    }

    /// The model for several media of which the decoder is one part, if it is.
    pub fn wrapper(&self) -> Option<&'static Wrapper> {
        Wrapper::of(&self.config)
    }

    /// Whether the tensor or module called `name` is for other media than text.
    pub fn is_beside(&self, name: &str) -> bool {
        self.wrapper()
            .is_some_and(|wrapper| wrapper.is_beside(name))
    }

    /// The name of the tensor that a file has as `stored`.
    pub(crate) fn in_memory<'a>(&self, stored: &'a str) -> Cow<'a, str> {
        let wrapper = self.wrapper();
        wrapper.map_or(Cow::Borrowed(stored), |wrapper| wrapper.in_memory(stored))
    }

    /// What the tensor called `name` is called in a file, or would be beside those that there are.
    pub(crate) fn on_disk<'a>(&'a self, name: &'a str) -> Cow<'a, str> {
        let embedding = self.embedding();
        let is_renamed = self.weights.stored(&embedding) != embedding;
        match self.wrapper() {
            Some(wrapper) if self.info(name).is_none() && is_renamed => wrapper.on_disk(name),
            _ => Cow::Borrowed(self.weights.stored(name)),
        }
    }

    /// The token embedding's weight.
    pub(crate) fn embedding(&self) -> String {
        format!("{}.embed_tokens.weight", architecture::body(&self.config))
    }

    /// Whether the output head is the embedding: as `config.json` says, or if it is silent, as transformers assumes of the family;
    /// of an unknown one and of a model for several media, when no head is stored.
    pub fn ties_embeddings(&self) -> bool {
        let by_config = || architecture::ties_embeddings(&self.config);
        match architecture::ties_by_files(&self.config) {
            true => None,
            false => by_config(),
        }
        .unwrap_or_else(|| self.info(HEAD).is_none())
    }

    /// As [`Self::get`]; for the output head of a model that [ties](Self::ties_embeddings) it and stores none, the embedding.
    pub(crate) fn weight(&self, name: &str) -> Option<Tensor> {
        let tied =
            || (name == HEAD && self.ties_embeddings()).then(|| self.get(&self.embedding()))?;
        self.get(name).or_else(tied)
    }

    /// The decoder's family, if it is known.
    pub fn family(&self) -> Option<&'static Family> {
        architecture::family(&self.config).ok()
    }

    /// Every linear projection that an adapter can target, sorted by name: the two-dimensional `.weight` tensors that
    /// are not embeddings, and `lm_head` also when it is tied to the embedding.
    pub fn linear_modules(&self) -> Vec<LinearModule> {
        let mut modules: Vec<LinearModule> = self
            .names()
            .filter_map(|tensor| {
                let name = tensor.strip_suffix(".weight")?;
                let leaf = name.rsplit('.').next()?;
                if leaf.contains("embed") || leaf.contains("norm") || matches!(leaf, "wte" | "wpe")
                {
                    return None;
                }
                match self.info(tensor)?.1 {
                    [out_features, in_features] => Some(LinearModule {
                        name: name.to_owned(),
                        in_features: *in_features,
                        out_features: *out_features,
                    }),
                    _ => None,
                }
            })
            .collect();
        if self.ties_embeddings()
            && self.info(HEAD).is_none()
            && let Some((_, [out_features, in_features])) = self.info(&self.embedding())
        {
            modules.push(LinearModule {
                name: OUTPUT_HEAD.into(),
                in_features: *in_features,
                out_features: *out_features,
            });
        }
        modules.sort_by(|left, right| left.name.cmp(&right.name));
        modules
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::fs;

    use super::*;
    use crate::tensors::safetensors_write::write_safetensors;

    const INDEX: &str = "model.safetensors.index.json";
    const SINGLE: &str = "model.safetensors";

    fn write_shard(dir: &Path, file: &str, tensors: &[(&str, &[usize])]) {
        let tensors = tensors.iter().map(|(name, shape)| {
            let n_values = shape.iter().product();
            (
                (*name).to_owned(),
                Tensor::from_f32(shape, vec![0.5; n_values]).expect("sized"),
            )
        });
        write_safetensors(dir.join(file), tensors, &BTreeMap::new()).expect("written");
    }

    fn model_dir(config: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("temporary directory");
        fs::write(dir.path().join("config.json"), config).expect("writable");
        dir
    }

    #[test]
    fn missing_things_are_not_found_and_named() {
        assert!(
            ModelFiles::open("/nonexistent")
                .expect_err("missing")
                .is_not_found()
        );
        let dir = model_dir("{}");
        assert!(
            ModelFiles::open(dir.path())
                .expect_err("no weights")
                .is_not_found()
        );
        fs::write(
            dir.path().join(INDEX),
            r#"{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}"#,
        )
        .expect("writable");
        write_shard(
            dir.path(),
            "model-00001-of-00002.safetensors",
            &[("a", &[1])],
        );
        let error = ModelFiles::open(dir.path()).expect_err("a shard is missing");
        assert!(error.is_not_found() && error.to_string().contains("model-00002-of-00002"));
        write_shard(
            dir.path(),
            "model-00002-of-00002.safetensors",
            &[("b", &[1])],
        );
        let model = ModelFiles::open(dir.path()).expect("complete");
        assert_eq!(model.names().collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(model.files().len(), 2);
        fs::remove_file(dir.path().join(INDEX)).expect("there");
        assert_eq!(
            ModelFiles::open(dir.path())
                .expect("complete")
                .files()
                .len(),
            2
        );
    }

    #[test]
    fn an_index_may_not_lead_out_of_the_directory() {
        for file in ["../model.safetensors", "/etc/passwd", "a/b.safetensors", ""] {
            let dir = model_dir("{}");
            let index = serde_json::json!({"weight_map": {"a": file}});
            fs::write(dir.path().join(INDEX), index.to_string()).expect("writable");
            let error = ModelFiles::open(dir.path()).expect_err(file);
            assert_eq!(error.code(), "malformed", "{error}");
        }
    }

    #[test]
    fn linear_modules_are_the_matrices_that_are_not_embeddings() {
        let dir = model_dir("{}");
        write_shard(
            dir.path(),
            SINGLE,
            &[
                ("model.embed_tokens.weight", &[8, 2]),
                ("model.norm.weight", &[2]),
                ("model.layers.0.q_proj.weight", &[4, 2]),
                ("model.layers.0.q_proj.bias", &[4]),
            ],
        );
        let model = ModelFiles::open(dir.path()).expect("complete");
        let names: Vec<_> = model
            .linear_modules()
            .into_iter()
            .map(|module| (module.name, module.out_features, module.in_features))
            .collect();
        assert_eq!(
            names,
            [
                ("lm_head".to_owned(), 8, 2),
                ("model.layers.0.q_proj".to_owned(), 4, 2)
            ]
        );
        assert!(model.ties_embeddings());
        assert_eq!(model.quantization(), None);
    }

    #[test]
    fn quantised_bases_are_recognised() {
        let dir = model_dir(r#"{"quantization_config": {"quant_method": "gptq"}}"#);
        write_shard(dir.path(), SINGLE, &[("a", &[1])]);
        let model = ModelFiles::open(dir.path()).expect("complete");
        assert_eq!(model.quantization().as_deref(), Some("gptq"));
        let dir = model_dir("{}");
        write_shard(dir.path(), SINGLE, &[("q_proj.qweight", &[1])]);
        let model = ModelFiles::open(dir.path()).expect("complete");
        assert!(
            model
                .quantization()
                .is_some_and(|method| method.contains("qweight"))
        );
    }
}
