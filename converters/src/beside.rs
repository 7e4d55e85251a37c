//! What lies beside the files that an adapter is read from: carried along, left out by name, or refused because it was trained.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::error::{Error, Result};
use crate::formats::{Format, format_of, gguf_lora};
use crate::problem::Problem;
use crate::source::Source;

mod carried;
mod conversation;
mod names;
mod weights;

pub use carried::Carried;
pub(crate) use carried::TEMPLATES_DIR;
pub use conversation::{ConversationSettings, other_conversation};
pub(crate) use names::checkpoint_number;
pub(crate) use weights::module_of;

use names::Known;
use weights::{Found, Judge};

/// Most files that are listed by name; more are counted.
const LISTED: usize = 1000;
/// Most names of one kind in a line of text.
const SHOWN: usize = 20;
/// Most weight files that are opened.
const MAX_WEIGHTS: usize = 1 << 10;

/// A file or directory that is not read, and what it is taken for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct LeftOut {
    /// What it is, in the plural: "by-products of training", "other checkpoints", ...
    pub what: &'static str,
    /// Its name below the adapter's directory; that of a directory ends in `/`.
    pub name: String,
}

/// What lies beside an adapter's files.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Beside {
    /// Tokenizer, chat template and generation settings, which go where the adapter goes.
    pub carried: Carried,
    /// Everything else, sorted by kind.
    pub left_out: Vec<LeftOut>,
    /// Entries beyond those of `left_out`.
    #[serde(skip_serializing_if = "is_zero")]
    pub n_more: usize,
    /// Weights that were trained and would be lost, and files that must be sound and are not.
    #[serde(skip)]
    pub problems: Vec<Problem>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_zero(n: &usize) -> bool {
    *n == 0
}

impl Beside {
    /// What lies beside the adapter at `path`, a directory or a file in one. A GGUF LoRA that is given by its file stands for
    /// itself, whatever lies in the same directory.
    ///
    /// # Errors
    /// If the directory cannot be listed or the adapter's own files cannot be opened.
    ///
    /// ```
    /// use monteclora_converters::Beside;
    /// # use monteclora_converters::{Tensor, write_safetensors};
    /// # let dir = tempfile::tempdir().expect("a temporary directory");
    /// # std::fs::write(
    /// #     dir.path().join("adapter_config.json"),
    /// #     r#"{"peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["q_proj"]}"#,
    /// # ).expect("writable");
    /// # let site = "base_model.model.model.layers.0.self_attn.q_proj";
    /// # write_safetensors(dir.path().join("adapter_model.safetensors"), [
    /// #     (format!("{site}.lora_A.weight"), Tensor::from_f32(&[1, 2], vec![1.0, 2.0])?),
    /// #     (format!("{site}.lora_B.weight"), Tensor::from_f32(&[2, 1], vec![0.5, 0.0])?),
    /// # ], &Default::default())?;
    /// std::fs::write(dir.path().join("chat_template.jinja"), "{{ messages }}").expect("writable");
    /// std::fs::write(dir.path().join("optimizer.pt"), "").expect("writable");
    /// let beside = Beside::of(dir.path())?;
    /// assert_eq!(beside.carried.names(), ["chat_template.jinja"]);
    /// assert_eq!(beside.left_out_line().as_deref(), Some("by-products of training (optimizer.pt)"));
    /// # Ok::<(), monteclora_converters::Error>(())
    /// ```
    pub fn of(path: &Path) -> Result<Self> {
        Self::of_format(path, format_of(path))
    }

    /// [`Self::of`] for a path that is read as `format`.
    ///
    /// # Errors
    /// As [`Self::of`].
    pub fn of_format(path: &Path, format: &dyn Format) -> Result<Self> {
        let source = Source::of(path)?;
        let is_self_contained = format.about().file_name.is_some();
        let mut beside = match is_self_contained && source.named.is_some() {
            true => Self::default(),
            false => {
                let read = format.files(path)?;
                Self::look(&source, &read)?
            }
        };
        if is_self_contained {
            let what = names::CONVERTERS;
            let unread = gguf_lora::unread(path).into_iter();
            let unread = unread.map(|name| LeftOut { what, name });
            beside.left_out.extend(unread);
            beside.left_out.sort();
        }
        Ok(beside)
    }

    /// Sorts every entry of the directory but the files `read`.
    fn look(source: &Source, read: &[PathBuf]) -> Result<Self> {
        let (dir, judge) = (source.dir.as_path(), Judge::new(source, read)?);
        let mut beside = Self {
            carried: Carried::new(dir),
            ..Self::default()
        };
        let read: BTreeSet<_> = read.iter().filter_map(|path| path.file_name()).collect();
        let mut weights = Vec::new();
        let mut left_out = Vec::new();
        let mut leave = |what, name: &str| {
            let name = name.to_owned();
            left_out.push(LeftOut { what, name });
        };
        for (name, path) in entries(dir)? {
            if read.contains(std::ffi::OsStr::new(&name)) {
                continue;
            }
            if path.is_dir() {
                match names::directory(&name, &path) {
                    Known::Carried => beside.carried.push_dir(&name, &path)?,
                    Known::LeftOut(what) => leave(what, &format!("{name}/")),
                    Known::Weights => {
                        for (inner, path) in entries(&path)? {
                            if names::is_weights(&inner) && !path.is_dir() {
                                weights.push((format!("{name}/{inner}"), path));
                            }
                        }
                        leave(names::UNKNOWN, &format!("{name}/"));
                    }
                }
                continue;
            }
            match names::file(&name) {
                Known::Carried => beside.carried.push(&name),
                Known::LeftOut(what) => leave(what, &name),
                Known::Weights if path.symlink_metadata().is_ok() && !path.exists() => {
                    let message = "a link to a file of weights that is not there, as in a cache of the Hub that was not fetched to the end";
                    let fix = "fetch it with `hf download`, or remove the link if it is not part of the adapter";
                    beside
                        .problems
                        .push(Problem::new("missing-file", name, message, fix));
                }
                Known::Weights => weights.push((name, path)),
            }
        }
        if weights.len() > MAX_WEIGHTS {
            let at = format!("`{}`", dir.display());
            let message = format!(
                "{} files of weights lie beside the adapter; at most {MAX_WEIGHTS} are looked at",
                weights.len()
            );
            let fix = "move the adapter's own files to a directory of their own";
            beside
                .problems
                .push(Problem::new("trained-weights", at, message, fix));
            weights.clear();
        }
        for (name, found) in judge.sort(dir, weights) {
            match found {
                Found::LeftOut(what) => leave(what, &name),
                Found::Problem(problem) => beside.problems.push(problem),
            }
        }
        beside.problems.extend(beside.carried.problems());
        left_out.sort();
        beside.n_more = left_out.len().saturating_sub(LISTED);
        left_out.truncate(LISTED);
        beside.left_out = left_out;
        Ok(beside)
    }

    /// Everything that is left out, in one line: the kinds, each with its first names.
    pub fn left_out_line(&self) -> Option<String> {
        left_out_line(&self.left_out, self.n_more)
    }

    /// The same without files that are copied by other means.
    #[must_use]
    pub fn without(mut self, names: &[&str]) -> Self {
        self.carried.take(names);
        self.left_out
            .retain(|left| !names.contains(&left.name.as_str()));
        self
    }

    /// The same with what is carried among what is left out, for a destination that has no place for it.
    #[must_use]
    pub fn nothing_carried(mut self, what: &'static str) -> Self {
        let names = std::mem::take(&mut self.carried).into_names();
        self.leave(what, names);
        self
    }

    /// The same for a destination whose adapter is another than it was: what was measured with it is no longer true.
    #[must_use]
    pub fn nothing_measured(mut self) -> Self {
        let measured = self.carried.take(&carried::MEASURED);
        self.leave("measured with the adapter as it was", measured);
        self
    }

    /// The same for a destination that is a model: what is told of the adapter alone stays behind.
    #[must_use]
    pub fn no_notes(mut self) -> Self {
        let notes = self.carried.take(&carried::OF_ADAPTER);
        self.leave("about the adapter, not the merged model", notes);
        self
    }

    fn leave(&mut self, what: &'static str, names: Vec<String>) {
        let names = names.into_iter().map(|name| LeftOut { what, name });
        self.left_out.extend(names);
        self.left_out.sort();
    }
}

/// `left_out` in one line; `n_more` were only counted.
fn left_out_line(left_out: &[LeftOut], n_more: usize) -> Option<String> {
    let mut parts: Vec<String> = left_out
        .chunk_by(|one, next| one.what == next.what)
        .map(|group| {
            let names = group.iter().map(|left| left.name.as_str());
            let shown: Vec<&str> = names.take(SHOWN).collect();
            let more = match group.len().saturating_sub(SHOWN) {
                0 => String::new(),
                n => format!(" and {n} more"),
            };
            format!("{} ({}{more})", group[0].what, shown.join(", "))
        })
        .collect();
    if n_more > 0 {
        parts.push(format!("{n_more} more entries"));
    }
    (!parts.is_empty()).then(|| parts.join(", "))
}

/// Name and path of every entry of `dir`, sorted.
pub(crate) fn entries(dir: &Path) -> Result<Vec<(String, PathBuf)>> {
    let mut entries = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(Error::io("read", dir))? {
        let entry = entry.map_err(Error::io("read", dir))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        entries.push((name, entry.path()));
    }
    entries.sort();
    Ok(entries)
}

#[cfg(test)]
mod tests;
