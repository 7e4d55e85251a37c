//! What a directory is that is no Hugging Face model, and what to give or do instead.

use std::path::Path;

use crate::error::{Error, Result};
use crate::json;
use crate::problem::{Problem, listed};

/// Names of what lies in `dir`, sorted; none if it cannot be listed.
fn names_in(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten();
    let name =
        |entry: std::io::Result<std::fs::DirEntry>| entry.ok()?.file_name().into_string().ok();
    let mut names: Vec<String> = entries.filter_map(name).collect();
    names.sort();
    names
}

fn ending<'a>(names: &'a [String], ends: &[&str]) -> Vec<&'a str> {
    let lower = |name: &str| name.to_ascii_lowercase();
    let names = names.iter().map(String::as_str);
    names
        .filter(|name| ends.iter().any(|end| lower(name).ends_with(end)))
        .collect()
}

/// Why `dir`, in which there is no config.json, is no model.
pub(super) fn of_config(dir: &Path) -> Error {
    let names = names_in(dir);
    let has = |name: &str| names.iter().any(|found| found == name);
    let shown = |name: &str| dir.join(name).display().to_string();
    let inside: Vec<&str> = names
        .iter()
        .map(String::as_str)
        .filter(|name| dir.join(name).join("config.json").is_file())
        .collect();
    let snapshots: Vec<String> = match has("snapshots") {
        true => names_in(&dir.join("snapshots")),
        false => Vec::new(),
    };
    let ggufs = ending(&names, &[".gguf"]);
    let (message, fix) = if has("adapter_config.json") {
        let config = json::read_object(&dir.join("adapter_config.json")).unwrap_or_default();
        let base = config
            .get("base_model_name_or_path")
            .and_then(|base| base.as_str());
        let fix = match base {
            Some(base) => format!("give its base, `{base}`, or a directory that holds it"),
            None => "give the base that it was trained on".to_owned(),
        };
        ("an adapter, which is no model by itself".to_owned(), fix)
    } else if let Some(snapshot) = snapshots.last() {
        (
            "the Hub cache's folder of a model".to_owned(),
            format!("give `{}`", shown(&format!("snapshots/{snapshot}"))),
        )
    } else if !ggufs.is_empty() {
        (
            format!(
                "holds GGUF files ({}), not a Hugging Face model",
                listed(&ggufs)
            ),
            format!("give the file itself: `{}`", shown(ggufs[0])),
        )
    } else if let Some(last) = inside.last() {
        (
            format!("no config.json; there is one in {}", listed(&inside)),
            format!("give that directory, such as `{}`", shown(last)),
        )
    } else if has("params.json") && !ending(&names, &[".pth"]).is_empty() {
        ("a model in Meta's own format".to_owned(), "take the Hugging Face files, or convert it with transformers' convert_llama_weights_to_hf.py".to_owned())
    } else {
        let message = "a Hugging Face model directory must hold config.json";
        return Error::not_found(&dir.join("config.json"), message);
    };
    let at = format!("`{}`", dir.display());
    Problem::new("not-found", at, message, fix).exit(2).into()
}

/// Why there are no weights called `stem` in `dir`.
pub(crate) fn of_weights(dir: &Path, stem: &str) -> Error {
    let names = names_in(dir);
    let mut pickles = ending(&names, &[".bin", ".pt", ".pth", ".ckpt"]);
    pickles.retain(|name| {
        ![
            "training_args.bin",
            "optimizer.pt",
            "scheduler.pt",
            "scaler.pt",
        ]
        .contains(name)
            && !name.starts_with("rng_state")
    });
    let others = ending(&names, &[".h5", ".msgpack", ".onnx", ".tflite"]);
    let strange = ending(&names, &[".safetensors"]);
    let ggufs = ending(&names, &[".gguf"]);
    let none = format!("no {stem}.safetensors and no shards");
    let (message, fix) = if !strange.is_empty() {
        (format!("{none}, but {}", listed(&strange)), "take the files in Hugging Face's layout; Mistral's own (consolidated.safetensors) has other names for every tensor".to_owned())
    } else if !pickles.is_empty() {
        (
            format!("{none}, but PyTorch pickles ({}), which are not read: reading one runs code", listed(&pickles)),
            "save it again with transformers: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT), and the tokenizer alike".to_owned(),
        )
    } else if !ggufs.is_empty() {
        (
            format!("{none}, but GGUF files ({})", listed(&ggufs)),
            format!("give the file itself: `{}`", dir.join(ggufs[0]).display()),
        )
    } else if !others.is_empty() {
        (
            format!(
                "{none}, but weights of TensorFlow, Flax or ONNX ({})",
                listed(&others)
            ),
            "take the model's safetensors files".to_owned(),
        )
    } else {
        (
            format!("{none}; only safetensors weights are read"),
            "fetch the model again".to_owned(),
        )
    };
    let at = format!("`{}`", dir.display());
    Problem::new("not-found", at, message, fix).exit(2).into()
}

/// Refuses what is no directory.
pub(super) fn require_dir(dir: &Path) -> Result<()> {
    match dir.is_dir() {
        true => Ok(()),
        false => Err(Error::not_found(dir, "there is no such model directory")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::ModelFiles;

    /// What opening a directory with these files (those that end in `/` are directories) says.
    fn said(files: &[(&str, &str)]) -> String {
        let dir = tempfile::tempdir().expect("a directory");
        for (name, text) in files {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().expect("inside")).expect("created");
            std::fs::write(path, text).expect("written");
        }
        let error = ModelFiles::open(dir.path()).expect_err("no model");
        assert!(error.is_not_found(), "{error}");
        error.to_string()
    }

    #[test]
    fn a_directory_that_is_no_model_is_called_by_what_it_is() {
        let adapter = r#"{"base_model_name_or_path": "org/base"}"#;
        for (files, parts) in [
            (
                &[("adapter_config.json", adapter)][..],
                &["an adapter", "`org/base`"][..],
            ),
            (
                &[("snapshots/abc/config.json", "{}"), ("refs/main", "abc")],
                &["Hub cache", "snapshots/abc"],
            ),
            (
                &[("model-Q8_0.gguf", "GGUF"), ("README.md", "")],
                &["GGUF", "model-Q8_0.gguf`"],
            ),
            (
                &[
                    ("checkpoint-5/config.json", "{}"),
                    ("trainer_state.json", "{}"),
                ],
                &["no config.json", "checkpoint-5`"],
            ),
            (
                &[("params.json", "{}"), ("consolidated.00.pth", "")],
                &["Meta", "convert_llama"],
            ),
            (&[("README.md", "")], &["must hold config.json"]),
            (
                &[
                    ("config.json", "{}"),
                    ("pytorch_model.bin", ""),
                    ("training_args.bin", ""),
                ],
                &["pickles (pytorch_model.bin)", "save_pretrained"],
            ),
            (
                &[("config.json", "{}"), ("model.gguf", "GGUF")],
                &["GGUF files (model.gguf)", "model.gguf`"],
            ),
            (
                &[("config.json", "{}"), ("tf_model.h5", "")],
                &["TensorFlow", "tf_model.h5"],
            ),
            (
                &[("config.json", "{}"), ("consolidated.safetensors", "")],
                &["consolidated.safetensors", "Hugging Face's layout"],
            ),
            (&[("config.json", "{}")], &["only safetensors weights"]),
        ] {
            let said = said(files);
            for part in parts {
                assert!(said.contains(part), "{part} is not in: {said}");
            }
        }
    }
}
