//! The headers of a base compared with its config.json, as transformers does while it loads: what is missing, misshapen or of
//! another type, and what is stored and would not be read.

use std::collections::{BTreeMap, BTreeSet};

use super::quantised::FIX;
use super::{HEAD, ModelFiles, is_read_in_blocks, names};
use crate::architecture::{self, BODY, Bias, Family, ModelShape, WRAPPERS};
use crate::error::{Error, Result};
use crate::module_path::layer_of;
use crate::problem::{Problem, listed};
use crate::targets::OUTPUT_HEAD;
use crate::tensors::compare::are_equal;

mod sizes;

impl ModelFiles {
    /// Whether the files hold the model that `config.json` describes: every tensor under its name, of its shape and of a type of
    /// real numbers (or in [blocks](Self::blocks) of them), and no other tensor but buffers that are computed anew. Returns what may be wrong although the model
    /// can be used. Of a family that is not known only the types are checked.
    ///
    /// Headers are read, and the data only of a head that is stored although it is the embedding.
    ///
    /// # Errors
    /// `quantised-base`; a refusal with everything else that is wrong.
    pub fn check(&self) -> Result<Vec<Problem>> {
        if self.blocks().is_none()
            && let Some(method) = self.quantization()
        {
            let (message, fix) = match is_read_in_blocks(self.config()) {
                true => (
                    format!(
                        "config.json says that the weights are quantised ({method}), but they are stored as they are"
                    ),
                    "remove `quantization` and `quantization_config` from config.json",
                ),
                false => (format!("the weights are quantised ({method})"), FIX),
            };
            let at = format!("`{}`", self.dir().display());
            return Err(Problem::new("quantised-base", at, message, fix).into());
        }
        let mut warnings = architecture::unread(self.config());
        warnings.extend(self.beside());
        if architecture::family(self.config()).is_err() {
            return Ok(warnings);
        }
        let mut shape = ModelShape::layout(self.config())
            .map_err(|problems| Error::refused(self.dir(), problems))?;
        shape.tie_word_embeddings = self.ties_embeddings();
        warnings.extend(self.other_media());
        let comparison = Comparison::new(self, &shape);
        warnings.extend(comparison.inert());
        Error::refuse_any(self.dir(), comparison.problems())?;
        Ok(warnings)
    }
}

/// Names of files and model held against each other.
struct Comparison<'a> {
    files: &'a ModelFiles,
    shape: &'a ModelShape,
    expected: BTreeMap<String, Vec<usize>>,
    missing: BTreeSet<String>,
    unread: Vec<&'a str>,
    wrapped: Vec<names::Wrapped>,
}

impl<'a> Comparison<'a> {
    fn new(files: &'a ModelFiles, shape: &'a ModelShape) -> Self {
        let tensors = shape.tensors().into_iter();
        let expected: BTreeMap<_, _> = tensors.map(|tensor| (tensor.name, tensor.shape)).collect();
        let is_missing = |name: &&String| files.info(name).is_none();
        let mut missing: BTreeSet<String> = expected.keys().filter(is_missing).cloned().collect();
        let is_tied_head = |name: &str| shape.tie_word_embeddings && name == HEAD;
        let mut unread: Vec<&str> = files
            .names()
            .filter(|name| !expected.contains_key(*name) && !is_inert(name) && !is_tied_head(name))
            .filter(|name| !files.is_beside(name))
            .collect();
        let wrapped = names::wrapped(&unread, &missing);
        unread.retain(|name| wrapped.iter().all(|wrapped| wrapped.stored != *name));
        for wrapped in &wrapped {
            missing.remove(&wrapped.expected);
        }
        Self {
            files,
            shape,
            expected,
            missing,
            unread,
            wrapped,
        }
    }

    /// Buffers that are not read, in one warning.
    fn inert(&self) -> Option<Problem> {
        let inert = self.files.names().filter(|name| is_inert(name));
        let inert: Vec<&str> = inert.filter(|name| !self.files.is_beside(name)).collect();
        let first = inert.first()?;
        let message = format!(
            "and {} more buffers are not read: they are computed from config.json",
            inert.len() - 1
        );
        let message = match inert.len() {
            1 => "not read: it is computed from config.json".to_owned(),
            _ => message,
        };
        Some(Problem::new("unread-tensor", *first, message, ""))
    }

    fn problems(&self) -> Vec<Problem> {
        let mut problems: Vec<Problem> = names::report(&self.wrapped).into_iter().collect();
        problems.extend(self.types());
        problems.extend(self.shapes());
        problems.extend(self.layers());
        problems.extend(self.absent());
        problems.extend(self.superfluous());
        problems.extend(self.tied_head());
        problems
    }

    fn types(&self) -> Vec<Problem> {
        let wrong = self.expected.keys().filter_map(|name| {
            let (dtype, _) = self.files.info(name)?;
            (!dtype.is_float()).then(|| {
                let message = format!(
                    "{dtype} in `{}`, which is no type of real numbers",
                    self.files.file_of(name)
                );
                Problem::new("dtype", name, message, "store it as BF16, F16 or F32")
            })
        });
        wrong.collect()
    }

    /// Layers that are not there at all, and layers beyond the last.
    fn layers(&self) -> Vec<Problem> {
        let n_layers = self.shape.num_hidden_layers;
        let mut problems = Vec::new();
        let mut problem = |message: String, fix: &str| {
            let (at, _) = architecture::entry(self.files.config(), "num_hidden_layers");
            problems.push(Problem::new("layers", at, message, fix));
        };
        let absent: Vec<String> = self.absent_layers().iter().map(usize::to_string).collect();
        if !absent.is_empty() {
            let message = format!(
                "is {n_layers}, but no tensor is stored of layers {}",
                listed(&absent)
            );
            problem(
                message,
                "use a complete model directory, or correct the key",
            );
        }
        let beyond: Vec<&str> = self
            .unread
            .iter()
            .copied()
            .filter(|name| self.is_beyond(name))
            .collect();
        if let Some(first) = beyond.first() {
            let numbers: BTreeSet<usize> = beyond.iter().filter_map(|name| layer(name)).collect();
            let numbers: Vec<String> = numbers.iter().map(usize::to_string).collect();
            let message = format!(
                "is {n_layers}, but {} tensors are stored of layers {}, which would not be read: `{first}`",
                beyond.len(),
                listed(&numbers)
            );
            problem(message, "correct the key, or remove these tensors");
        }
        problems
    }

    fn absent_layers(&self) -> BTreeSet<usize> {
        let has_any = |number: &usize| {
            self.expected
                .keys()
                .any(|name| layer(name) == Some(*number) && !self.missing.contains(name))
        };
        let touched: BTreeSet<usize> = self.missing.iter().filter_map(|name| layer(name)).collect();
        touched
            .into_iter()
            .filter(|number| !has_any(number))
            .collect()
    }

    fn is_beyond(&self, name: &str) -> bool {
        layer(name).is_some_and(|number| number >= self.shape.num_hidden_layers)
    }

    /// What is missing, one report for all layers.
    fn absent(&self) -> Vec<Problem> {
        let whole = self.absent_layers();
        let missing = self.missing.iter().map(String::as_str);
        let missing =
            missing.filter(|name| layer(name).is_none_or(|number| !whole.contains(&number)));
        let (biases, others) = self.by_bias_key(missing);
        let mut problems = Vec::new();
        for (key, names) in biases {
            let message = format!(
                "is true, but {} biases are missing, such as `{}`",
                names.len(),
                names[0]
            );
            let fix = format!("use a complete model directory, or set \"{key}\": false");
            problems.push(Problem::new(
                "missing-tensor",
                architecture::entry(self.files.config(), key).0,
                message,
                fix,
            ));
        }
        for names in grouped(others.into_iter()) {
            let message = format!("missing{}", in_more_layers(names.len()));
            let fix = match names[0] {
                HEAD => {
                    "use a complete model directory; if the head is the embedding, set \"tie_word_embeddings\": true in config.json"
                }
                _ => "use a complete Hugging Face model directory",
            };
            problems.push(Problem::new("missing-tensor", names[0], message, fix));
        }
        problems
    }

    /// What is stored and not read, one report for all layers.
    fn superfluous(&self) -> Vec<Problem> {
        let unread = self
            .unread
            .iter()
            .copied()
            .filter(|name| !self.is_beyond(name));
        let (biases, others) = self.by_bias_key(unread);
        let mut problems = Vec::new();
        for (key, names) in biases {
            let message = format!(
                "is not true, but {} biases are stored, which would not be read, such as `{}`",
                names.len(),
                names[0]
            );
            let fix = format!("set \"{key}\": true if the model has them, or remove them");
            problems.push(Problem::new(
                "unread-tensor",
                architecture::entry(self.files.config(), key).0,
                message,
                fix,
            ));
        }
        for names in grouped(others.into_iter()) {
            let message = format!(
                "stored in `{}`{}, but a {} with this config.json has no such tensor: it would not be read",
                self.files.file_of(names[0]),
                in_more_layers(names.len()),
                self.shape.class_name()
            );
            let fix = match names[0].contains("lora_") {
                true => {
                    "merge the adapter into the base (PEFT's merge_and_unload) and save it again"
                }
                false => {
                    "use a base of a family that has it, or remove it if the model was made without it"
                }
            };
            problems.push(Problem::new("unread-tensor", names[0], message, fix));
        }
        problems
    }

    /// Biases, by the key that says whether they are there, and the other names.
    fn by_bias_key<'n>(
        &self,
        names: impl Iterator<Item = &'n str>,
    ) -> (BTreeMap<&'static str, Vec<&'n str>>, Vec<&'n str>) {
        let (mut biases, mut others) = (BTreeMap::<_, Vec<&str>>::new(), Vec::new());
        for name in names {
            match bias_key(self.shape.family, name) {
                Some(key) => biases.entry(key).or_default().push(name),
                None => others.push(name),
            }
        }
        (biases, others)
    }

    /// A stored head that is not the embedding, which config.json says it is.
    fn tied_head(&self) -> Option<Problem> {
        if !self.shape.tie_word_embeddings {
            return None;
        }
        let name = self.files.embedding();
        let (head, embedding) = (self.files.get(HEAD)?, self.files.get(&name)?);
        let how = match head.shape() == embedding.shape() {
            true if are_equal(&head, &embedding) => return None,
            true => "differs".to_owned(),
            false => format!(
                "({:?}) differs in shape ({:?})",
                head.shape(),
                embedding.shape()
            ),
        };
        let says = match self.files.config().contains_key("tie_word_embeddings") {
            true => "config.json has tie_word_embeddings true",
            false => "tie_word_embeddings is not given, which means true",
        };
        let message = format!(
            "in `{}` {how} from {name}, but {says}: transformers 5 takes the stored head, transformers 4, vLLM and mistral.rs the embedding",
            self.files.file_of(HEAD)
        );
        let fix = format!(
            "set \"tie_word_embeddings\": false in config.json if {OUTPUT_HEAD} was trained by itself, or remove the tensor"
        );
        Some(Problem::new("tied-head", HEAD, message, fix))
    }
}

/// Buffers that older transformers wrote and nothing reads: they are recomputed from the configuration.
fn is_inert(name: &str) -> bool {
    const BUFFERS: [&str; 3] = [".rotary_emb.inv_freq", ".masked_bias", ".position_ids"];
    BUFFERS.iter().any(|buffer| name.ends_with(buffer))
}

/// The number of the block that a tensor belongs to.
fn layer(name: &str) -> Option<usize> {
    Some(in_layer(name)?.0)
}

/// The number of a tensor's block, and its name in there.
fn in_layer(name: &str) -> Option<(usize, &str)> {
    let (front, number, rest) = layer_of(name)?;
    let body = front.strip_suffix(".layers.")?;
    let mut wrapped = WRAPPERS.iter().map(|wrapper| wrapper.body);
    (body == BODY || wrapped.any(|known| known == body)).then_some((number, rest))
}

/// A tensor's name without its layer.
fn pattern(name: &str) -> &str {
    in_layer(name).map_or(name, |(_, rest)| rest)
}

/// Names that differ by their layer alone together, each in the order of layers.
fn grouped<'a>(names: impl Iterator<Item = &'a str>) -> Vec<Vec<&'a str>> {
    let mut groups: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for name in names {
        groups.entry(pattern(name)).or_default().push(name);
    }
    let mut groups: Vec<Vec<&str>> = groups.into_values().collect();
    for group in &mut groups {
        group.sort_by_key(|name| layer(name));
    }
    groups
}

fn in_more_layers(n_names: usize) -> String {
    match n_names {
        0 | 1 => String::new(),
        2 => ", as in 1 more layer".to_owned(),
        n => format!(", as in {} more layers", n - 1),
    }
}

/// The key that says whether there is a bias of this name.
fn bias_key(family: &Family, name: &str) -> Option<&'static str> {
    let projection = family.projection(pattern(name).strip_suffix(".bias")?)?;
    match projection.bias {
        Bias::Key(key) => Some(key),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
