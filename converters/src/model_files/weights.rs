//! The tensors of a base: as its safetensors files store them, or with matrices in blocks of quantised values.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::quantised::declared;
use crate::architecture::Wrapper;
use crate::error::{Error, Result};
use crate::gguf_base::reference;
use crate::tensors::blocks::{Affine, BlockMatrix};
use crate::tensors::dtype::DType;
use crate::tensors::safetensors_file::SafetensorsFile;
use crate::tensors::shards::ShardSet;
use crate::tensors::tensor::Tensor;

/// Every tensor under the name that it has in memory.
#[derive(Debug, Clone)]
pub(super) enum Weights {
    Files(ShardSet),
    Blocks(Blocks),
}

/// Tensors of which some are in blocks.
#[derive(Debug, Clone)]
pub(super) struct Blocks {
    paths: Vec<PathBuf>,
    /// With the file that each is in.
    tensors: BTreeMap<String, (Tensor, usize)>,
    /// The file itself, where the model is one.
    gguf: Option<PathBuf>,
}

impl Weights {
    /// Those of the model in `dir`, whose config.json is `config`.
    pub(super) fn open(dir: &Path, config: &Map<String, Value>) -> Result<Self> {
        if let Some((file, tensors)) = reference::open(dir, config)? {
            let tensors = tensors.into_iter();
            return Ok(Self::Blocks(Blocks {
                tensors: tensors.map(|(name, tensor)| (name, (tensor, 0))).collect(),
                paths: vec![file.clone()],
                gguf: Some(file),
            }));
        }
        let mut set = ShardSet::open(dir, "model")?;
        let wrapper = Wrapper::of(config);
        if let Some(wrapper) = wrapper {
            set = set.renamed(|name| wrapper.in_memory(name))?;
        }
        match Mlx::of(config, wrapper) {
            Some(mlx) if mlx.is_read() => Ok(Self::Blocks(mlx.blocks(set)?)),
            _ => Ok(Self::Files(set)),
        }
    }

    pub(super) fn paths(&self) -> &[PathBuf] {
        match self {
            Self::Files(set) => &set.paths,
            Self::Blocks(blocks) => &blocks.paths,
        }
    }

    /// The opened files, in the order of [`Self::paths`], of weights that are stored as they are.
    pub(super) fn shards(&self) -> &[SafetensorsFile] {
        match self {
            Self::Files(set) => &set.shards,
            Self::Blocks(_) => &[],
        }
    }

    pub(super) fn names(&self) -> Box<dyn Iterator<Item = &str> + '_> {
        match self {
            Self::Files(set) => Box::new(set.names()),
            Self::Blocks(blocks) => Box::new(blocks.tensors.keys().map(String::as_str)),
        }
    }

    pub(super) fn get(&self, name: &str) -> Option<Tensor> {
        match self {
            Self::Files(set) => set.get(name),
            Self::Blocks(blocks) => Some(blocks.tensors.get(name)?.0.clone()),
        }
    }

    pub(super) fn info(&self, name: &str) -> Option<(DType, &[usize])> {
        match self {
            Self::Files(set) => set.info(name),
            Self::Blocks(blocks) => {
                let (tensor, _) = blocks.tensors.get(name)?;
                Some((tensor.dtype(), tensor.shape()))
            }
        }
    }

    /// What the tensor called `name` is called in its file, where files have names of transformers' kind.
    pub(super) fn stored<'a>(&'a self, name: &'a str) -> &'a str {
        match self {
            Self::Files(set) => set.stored(name),
            Self::Blocks(_) => name,
        }
    }

    /// The file that holds the tensor called `name`.
    pub(super) fn path_of(&self, name: &str) -> Option<&Path> {
        match self {
            Self::Files(set) => set.path_of(name),
            Self::Blocks(blocks) => {
                let (_, file) = blocks.tensors.get(name)?;
                blocks.paths.get(*file).map(PathBuf::as_path)
            }
        }
    }

    /// The GGUF file that holds them.
    pub(super) fn gguf(&self) -> Option<&Path> {
        match self {
            Self::Files(_) => None,
            Self::Blocks(blocks) => blocks.gguf.as_deref(),
        }
    }

    /// What blocks there are, such as `GGUF, F32 and Q4_1`; none where weights are stored as they are.
    pub(super) fn blocks(&self) -> Option<String> {
        let Self::Blocks(Blocks { tensors, gguf, .. }) = self else {
            return None;
        };
        let formats = tensors.values().filter_map(|(tensor, _)| tensor.blocks());
        let formats: BTreeSet<String> = formats.map(BlockMatrix::format).collect();
        if formats.is_empty() {
            return None;
        }
        let formats: Vec<String> = formats.into_iter().collect();
        let formats = formats.join(" and ");
        Some(match gguf {
            Some(_) => format!("GGUF, {formats}"),
            None => formats,
        })
    }
}

/// Whether the blocks that `config` declares are decoded here.
pub(crate) fn is_read_in_blocks(config: &Map<String, Value>) -> bool {
    Mlx::of(config, Wrapper::of(config)).is_some_and(|mlx| mlx.is_read())
}

/// How config.json says that mlx-lm has quantised a model.
struct Mlx<'a> {
    settings: &'a Map<String, Value>,
    wrapper: Option<&'static Wrapper>,
}

impl<'a> Mlx<'a> {
    fn of(config: &'a Map<String, Value>, wrapper: Option<&'static Wrapper>) -> Option<Self> {
        let (key, _) = declared(config)?;
        let settings = config.get(key)?.as_object()?;
        let is_mlx = !settings.contains_key("quant_method") && settings.contains_key("group_size");
        is_mlx.then_some(Self { settings, wrapper })
    }

    /// What it says of one module; none if its weights are stored as they are.
    fn of_module(&self, module: &str) -> Option<&Map<String, Value>> {
        let in_memory = |key: &str| {
            let name = format!("{key}.weight");
            self.wrapper.map_or(key == module, |wrapper| {
                wrapper.in_memory(&name).strip_suffix(".weight") == Some(module)
            })
        };
        let own = self.settings.iter().find(|(key, _)| in_memory(key));
        match own.map(|(_, value)| value) {
            Some(Value::Object(own)) => Some(own),
            Some(Value::Bool(false)) => None,
            _ => Some(self.settings),
        }
    }

    /// Bits and group size, where they are whole numbers.
    fn sizes(settings: &Map<String, Value>) -> Option<(usize, usize)> {
        let of = |key: &str| usize::try_from(settings.get(key)?.as_u64()?).ok();
        Some((of("bits")?, of("group_size")?))
    }

    /// Whether all of its kinds of blocks are decoded here.
    fn is_read(&self) -> bool {
        let own = self.settings.values().filter_map(Value::as_object);
        own.chain([self.settings]).all(|settings| {
            let mode = settings.get("mode").and_then(Value::as_str);
            let sizes = Self::sizes(settings);
            mode.is_none_or(|mode| mode == "affine")
                && sizes.is_some_and(|(bits, _)| matches!(bits, 4 | 8))
        })
    }

    /// The tensors of `set`, each three that belong together as one matrix.
    fn blocks(&self, set: ShardSet) -> Result<Blocks> {
        let mut tensors = BTreeMap::new();
        let place = |name: &str| {
            let path = set.path_of(name)?;
            set.paths.iter().position(|known| known == path)
        };
        let module = |name: &str| -> Option<String> {
            let module = [".scales", ".biases"]
                .iter()
                .find_map(|end| name.strip_suffix(end))?;
            let weight = format!("{module}.weight");
            let is_packed = set.info(&weight)?.0 == DType::U32;
            is_packed.then(|| module.to_owned())
        };
        for name in set.names() {
            let (Some(tensor), Some(file)) = (set.get(name), place(name)) else {
                continue;
            };
            if module(name).is_some() {
                continue;
            }
            let packed = name
                .strip_suffix(".weight")
                .filter(|_| tensor.dtype() == DType::U32);
            let tensor = match packed.zip(packed.and_then(|module| self.of_module(module))) {
                Some((module, settings)) => {
                    let wrong = |message: String| {
                        Error::malformed(&set.paths[file], format!("{name}: {message}"))
                    };
                    let part = |part: &str| {
                        let part = format!("{module}.{part}");
                        set.get(&part)
                            .ok_or_else(|| wrong(format!("`{part}` is missing")))
                    };
                    let sizes = Self::sizes(settings).unwrap_or_default();
                    let affine = Affine::new(tensor, part("scales")?, part("biases")?, sizes);
                    Tensor::from_blocks(BlockMatrix::affine(affine.map_err(wrong)?))
                }
                None => tensor,
            };
            tensors.insert(name.to_owned(), (tensor, file));
        }
        Ok(Blocks {
            paths: set.paths.clone(),
            tensors,
            gguf: None,
        })
    }
}
