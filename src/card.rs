//! The model card of an adapter: README.md with the front matter that the Hub reads.

use std::path::Path;

use monteclora_converters::{
    AdapterConfig, Error, ExcludeModules, PeftType, Result, TargetModules, files, training_record,
};
use serde_json::Value;

use crate::hub::is_hub_id;
use crate::output::name_of;

/// Name of the file.
pub const FILE: &str = "README.md";

/// Line that marks the cards written by this program. Other cards are never overwritten.
const MARK: &str = "<!-- written by monteclora -->";

/// The contents of a card.
#[derive(Debug)]
pub struct Card<'a> {
    /// Name of the adapter.
    pub name: &'a str,
    /// The adapter's configuration.
    pub config: &'a AdapterConfig,
    /// Content of its run.json; null if there is none.
    pub record: &'a Value,
    /// Output of `eval --json` for it; null if nothing was measured.
    pub scores: &'a Value,
}

/// Scores that a card shows: name in `eval --json`, type on the Hub, and title.
const METRICS: [(&str, &str, &str); 6] = [
    ("loss", "loss", "Loss"),
    ("perplexity", "perplexity", "Perplexity"),
    ("token_accuracy", "accuracy", "Token accuracy"),
    ("accuracy", "accuracy", "Accuracy"),
    ("nll", "nll", "Negative log-likelihood"),
    ("ece", "ece", "Expected calibration error"),
];

/// Whether the card in `dir` was written by this program, so that the next export replaces it.
pub fn is_ours(dir: &Path) -> bool {
    std::fs::read_to_string(dir.join(FILE)).is_ok_and(|text| text.contains(MARK))
}

impl Card<'_> {
    /// Writes the card beside the adapter in `dir`, unless somebody else's card exists there. Returns whether it was
    /// written.
    ///
    /// # Errors
    /// Returns an error if the card cannot be written, or if an existing one cannot be read.
    pub fn write(&self, dir: &Path) -> Result<bool> {
        let path = dir.join(FILE);
        let is_free = match std::fs::read_to_string(&path) {
            Ok(text) => text.contains(MARK),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => true,
            Err(error) => return Err(Error::io("read", &path)(error)),
        };
        if is_free {
            files::write_text(&path, &self.text())?;
        }
        Ok(is_free)
    }

    /// The text of the card.
    pub fn text(&self) -> String {
        format!("{}\n{MARK}\n\n{}", self.front_matter(), self.body())
    }

    fn method(&self) -> &'static str {
        match (self.config.peft_type, self.config.monteclora.is_some()) {
            (PeftType::AdaLora, _) => "AdaLoRA",
            (PeftType::Ssf, _) => "SSF",
            (PeftType::Sparse, _) => "sparse",
            (PeftType::Lora, _) if self.config.use_dora => "DoRA",
            (PeftType::Lora, true) => "MonteCLoRA",
            (PeftType::Lora, false) => "LoRA",
        }
    }

    /// Whether PEFT loads the adapter.
    fn is_of_peft(&self) -> bool {
        !matches!(self.config.peft_type, PeftType::Ssf | PeftType::Sparse)
    }

    /// The name of the base model, if it is a Hub id.
    fn base(&self) -> Option<&str> {
        let base = self.config.base_model_name_or_path.as_deref();
        base.filter(|base| is_hub_id(base) && !Path::new(base).exists())
    }

    fn front_matter(&self) -> String {
        let mut lines = Vec::new();
        if let Some(base) = self.base() {
            lines.push(format!("base_model: {}", quoted(base)));
        }
        if self.is_of_peft() {
            lines.push("library_name: peft".to_owned());
        }
        lines.push("pipeline_tag: text-generation".to_owned());
        lines.push("tags:".to_owned());
        if let Some(base) = self.base() {
            lines.push(format!(
                "- {}",
                quoted(&format!("base_model:adapter:{base}"))
            ));
        }
        if self.is_of_peft() {
            lines.push("- lora".to_owned());
        }
        if self.config.monteclora.is_some() {
            lines.push("- monteclora".to_owned());
        }
        let scores = self.scores();
        if !scores.is_empty() {
            let data = self.scores["data"].as_str().unwrap_or("held-out rows");
            lines.push(format!(
                "model-index:\n- name: {}\n  results:\n  - task:\n      type: text-generation\n    dataset:\n      type: {data}\n      name: {data}\n    metrics:",
                quoted(self.name),
                data = quoted(data),
            ));
            for (kind, title, value) in scores {
                let title = quoted(title);
                lines.push(format!(
                    "    - type: {kind}\n      name: {title}\n      value: {value}"
                ));
            }
        }
        format!("---\n{}\n---", lines.join("\n"))
    }

    /// The measured scores: type, title and value.
    fn scores(&self) -> Vec<(&'static str, &'static str, f64)> {
        let found = METRICS.iter().filter_map(|(key, kind, title)| {
            Some((*kind, *title, self.scores["mean"][key].as_f64()?))
        });
        found.collect()
    }

    fn body(&self) -> String {
        let mut text = format!("# {}\n\nA {} adapter", self.name, self.method());
        let named = self.config.base_model_name_or_path.as_deref();
        match (self.base(), named) {
            (Some(base), _) => {
                text.push_str(&format!(" for [{base}](https://huggingface.co/{base})"));
            }
            (None, Some(name)) => {
                text.push_str(&format!(" for {}", name_of(Path::new(name))));
            }
            (None, None) => {}
        }
        text.push_str(".\n");
        if self.config.monteclora.is_some() {
            text.push_str(
                "\nMonteCLoRA ([arXiv:2411.04358](https://arxiv.org/abs/2411.04358)) is a Bayesian LoRA: these files hold the posterior, whose mean is the plain LoRA that PEFT loads with them.\n",
            );
        }
        text.push_str(&self.training());
        let scores = self.scores();
        if !scores.is_empty() {
            text.push_str("\n## Scores\n\n| | |\n|---|---|\n");
            for (_, title, value) in scores {
                text.push_str(&format!("| {title} | {value:.4} |\n"));
            }
            if let Some(rows) = self.scores["rows"].as_u64() {
                text.push_str(&format!(
                    "\nMeasured on {rows} rows with `monteclora eval`.\n"
                ));
            }
        }
        let base = self.base().unwrap_or("BASE");
        text.push_str("\n## Use\n");
        if self.is_of_peft() {
            text.push_str(&format!(
                "\n```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\nmodel = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base:?}), {name:?})\n```\n",
                name = self.name,
            ));
        } else {
            text.push_str(&format!(
                "\nPEFT does not know this type of adapter. `monteclora merge -m {base} -a {name} -o MERGED` writes a model for other programs.\n",
                name = self.name,
            ));
        }
        text.push_str(&format!(
            "\n```console\n$ monteclora chat -m {base} -a {name}\n$ monteclora serve -m {base} --adapter tuned={name}\n```\n",
            name = self.name,
        ));
        text
    }

    /// The section about the training, from the configuration and the record.
    fn training(&self) -> String {
        let config = self.config;
        let targets = match &config.target_modules {
            TargetModules::AllLinear => "all-linear".to_owned(),
            TargetModules::List(names) => names.join(", "),
            TargetModules::Regex(pattern) => format!("`{pattern}`"),
        };
        let mut rows = vec![("modules".to_owned(), targets)];
        if let Some(layers) = &config.layers_to_transform {
            let layers: Vec<String> = layers.iter().map(usize::to_string).collect();
            rows.push(("layers".to_owned(), layers.join(", ")));
        }
        match &config.exclude_modules {
            Some(ExcludeModules::List(names)) => {
                rows.push(("excluded modules".to_owned(), names.join(", ")));
            }
            Some(ExcludeModules::Regex(pattern)) => {
                rows.push(("excluded modules".to_owned(), format!("`{pattern}`")));
            }
            None => {}
        }
        if self.is_of_peft() {
            let rank = format!("{}, {}", config.r, config.lora_alpha);
            rows.insert(0, ("r, lora_alpha".to_owned(), rank));
        }
        let record = self.record;
        let mut told = |title: &str, value: &Value| {
            let text = match value {
                Value::Null => return,
                Value::String(text) => text.clone(),
                value => value.to_string(),
            };
            rows.push((title.to_owned(), text));
        };
        told("training rows", &record["train"]["examples"]);
        told(
            "trained tokens per pass",
            &record["train"]["trained_tokens"],
        );
        told("steps", &record["finished_step"]);
        let train = &record["config"]["train"];
        told("learning rate", &train["learning_rate"]);
        told("batch", &train["per_device_train_batch_size"]);
        told("accumulated batches", &train["gradient_accumulation_steps"]);
        told("seed", &record["seed"]);
        told("monteclora", &record["monteclora"]);
        told("SHA-256 of the training rows", &record["train"]["sha256"]);
        let rows = rows
            .iter()
            .map(|(title, value)| format!("| {title} | {value} |\n"));
        format!(
            "\n## Training\n\n| | |\n|---|---|\n{}",
            rows.collect::<String>()
        )
    }
}

/// Writes a card for the adapter with `config`, which was exported from `source` into `dir`.
///
/// # Errors
/// As [`Card::write`], or if the training record cannot be read.
pub fn write_exported(dir: &Path, config: &AdapterConfig, source: &Path) -> Result<()> {
    let card = Card {
        name: &name_of(dir),
        config,
        record: &training_record(source)?.unwrap_or_default(),
        scores: &Value::Null,
    };
    card.write(dir)?;
    Ok(())
}

/// Quotes a text for YAML, which accepts JSON strings.
fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}

#[cfg(test)]
mod tests {
    use monteclora_converters::Adapter;
    use serde_json::json;

    use super::*;

    fn config(base: &str) -> AdapterConfig {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/fixtures/adapters");
        let adapter = Adapter::read(&root.join("monteclora")).expect("a recorded adapter");
        AdapterConfig {
            base_model_name_or_path: Some(base.to_owned()),
            ..adapter.config
        }
    }

    #[test]
    fn a_card_names_base_library_tags_and_scores() {
        let config = config("org/base");
        let card = Card {
            name: "triage",
            config: &config,
            record: &json!({"seed": 7, "train": {"examples": 600}, "config": {"train": {"learning_rate": 0.001}}}),
            scores: &json!({"data": "test: rows.jsonl", "rows": 12, "mean": {"loss": 0.25, "accuracy": 0.75}}),
        };
        let text = card.text();
        for expected in [
            "---\nbase_model: \"org/base\"\nlibrary_name: peft\npipeline_tag: text-generation\ntags:\n- \"base_model:adapter:org/base\"\n- lora\n- monteclora\nmodel-index:\n",
            "type: \"test: rows.jsonl\"",
            "    - type: accuracy\n      name: \"Accuracy\"\n      value: 0.75\n",
            "| training rows | 600 |",
            "| learning rate | 0.001 |",
            "PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(\"org/base\"), \"triage\")",
        ] {
            assert!(text.contains(expected), "{expected}\n{text}");
        }
    }

    #[test]
    fn a_card_of_somebody_stays_and_local_paths_are_told_to_nobody() {
        let dir = tempfile::tempdir().expect("a directory");
        let config = config("/home/me/secret/base");
        let card = Card {
            name: "a",
            config: &config,
            record: &Value::Null,
            scores: &Value::Null,
        };
        assert!(!card.text().contains("/home/me") && card.text().contains("for base."));
        assert!(!card.text().contains("base_model:") && !card.text().contains("model-index"));
        assert!(card.write(dir.path()).expect("written"));
        assert!(card.write(dir.path()).expect("written again"));
        std::fs::write(dir.path().join(FILE), "# Mine").expect("written");
        assert!(!card.write(dir.path()).expect("left"));
        let text = std::fs::read_to_string(dir.path().join(FILE)).expect("readable");
        assert_eq!(text, "# Mine");
    }
}
