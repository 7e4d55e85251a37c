//! Models that mlx-lm has quantised: which of their tensors belong together, as config.json says.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use crate::architecture::Wrapper;
use crate::error::{Error, Result};
use crate::tensors::blocks::{Affine, BlockMatrix};
use crate::tensors::dtype::DType;
use crate::tensors::shards::ShardSet;
use crate::tensors::tensor::Tensor;

/// Whether mlx-lm wrote `config`, with blocks that are decoded here.
pub(crate) fn is_read_in_blocks(config: &Map<String, Value>) -> bool {
    Mlx::of(config).is_some_and(|mlx| mlx.unread().is_none())
}

/// What config.json says of mlx-lm's blocks.
pub(super) struct Mlx<'a> {
    settings: &'a Map<String, Value>,
    wrapper: Option<&'static Wrapper>,
}

impl<'a> Mlx<'a> {
    /// `None` if mlx-lm has not quantised the model.
    pub(super) fn of(config: &'a Map<String, Value>) -> Option<Self> {
        let is_mlx = |settings: &&Map<String, Value>| {
            !settings.contains_key("quant_method") && settings.contains_key("group_size")
        };
        // In the order in which mlx-lm looks for them.
        let keys = ["quantization", "quantization_config"].into_iter();
        let mut found = keys.filter_map(|key| config.get(key)?.as_object());
        Some(Self {
            settings: found.find(is_mlx)?,
            wrapper: Wrapper::of(config),
        })
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

    /// The first kind of blocks that is not decoded here.
    pub(super) fn unread(&self) -> Option<String> {
        let own = self.settings.iter();
        let own = own.filter_map(|(module, value)| Some((Some(module), value.as_object()?)));
        let mut all = std::iter::once((None, self.settings)).chain(own);
        all.find_map(|(module, settings)| {
            let mode = settings.get("mode").and_then(Value::as_str);
            let what = match (mode, Self::sizes(settings)) {
                (Some(mode), _) if mode != "affine" => format!("mode {mode}"),
                (_, None) => "no whole number for bits or group_size".to_owned(),
                (_, Some((4 | 8, _))) => return None,
                (_, Some((bits, _))) => format!("{bits} bits"),
            };
            Some(match module {
                Some(module) => format!("{what} in `{module}`"),
                None => what,
            })
        })
    }

    /// The tensors of `set` with the files they are in, each three that belong together as one matrix.
    pub(super) fn tensors(&self, set: &ShardSet) -> Result<BTreeMap<String, (Tensor, usize)>> {
        let is_packed = |name: &str| set.info(name).is_some_and(|(dtype, _)| dtype == DType::U32);
        let is_part = |name: &str| {
            let mut ends = [".scales", ".biases"].iter();
            ends.any(|end| {
                let module = name.strip_suffix(end);
                module.is_some_and(|module| is_packed(&format!("{module}.weight")))
            })
        };
        let mut tensors = BTreeMap::new();
        for name in set.names().filter(|name| !is_part(name)) {
            let path = set.path_of(name);
            let file = set.paths.iter().position(|known| Some(&**known) == path);
            let (Some(tensor), Some(file)) = (set.get(name), file) else {
                continue;
            };
            let packed = name.strip_suffix(".weight").filter(|_| is_packed(name));
            let settings = packed.and_then(|module| Some((module, self.of_module(module)?)));
            let tensor = match settings {
                Some((module, settings)) => {
                    let wrong = |message: String| {
                        let fix = "quantise the model again with mlx_lm.convert, or use a GGUF file or the full-precision model";
                        Error::malformed(&set.paths[file], format!("{name}: {message}; {fix}"))
                    };
                    let part = |part: &str| {
                        let part = format!("{module}.{part}");
                        let missing = || wrong(format!("`{part}` is missing"));
                        set.get(&part).ok_or_else(missing)
                    };
                    let sizes = Self::sizes(settings).unwrap_or_default();
                    let affine = Affine::new(tensor, part("scales")?, part("biases")?, sizes);
                    Tensor::from_blocks(BlockMatrix::affine(affine.map_err(wrong)?))
                }
                None => tensor,
            };
            tensors.insert(name.to_owned(), (tensor, file));
        }
        Ok(tensors)
    }
}
