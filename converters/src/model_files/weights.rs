//! The tensors of a base: as its safetensors files store them, or with matrices in blocks of quantised values.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::mlx::Mlx;
use crate::architecture::Wrapper;
use crate::error::Result;
use crate::gguf_base::reference;
use crate::tensors::blocks::BlockMatrix;
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
        if let Some(wrapper) = Wrapper::of(config) {
            set = set.renamed(|name| wrapper.in_memory(name))?;
        }
        match Mlx::of(config).filter(|mlx| mlx.unread().is_none()) {
            Some(mlx) => Ok(Self::Blocks(Blocks {
                tensors: mlx.tensors(&set)?,
                paths: set.paths,
                gguf: None,
            })),
            None => Ok(Self::Files(set)),
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
