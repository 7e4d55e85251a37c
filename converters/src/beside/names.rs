//! Names by which files beside an adapter are known, whatever wrote them.

use std::path::Path;

use crate::formats::peft::read::CONFIG_FILE;
use crate::json;

/// What a name says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Known {
    /// Belongs to the conversation that the adapter was trained on.
    Carried,
    /// Not read, and what it is.
    LeftOut(&'static str),
    /// Weights, whose content decides.
    Weights,
}

pub(super) const BY_PRODUCTS: &str = "by-products of training";
pub(super) const REPOSITORY: &str = "files of the repository";
pub(super) const OTHER_ADAPTERS: &str = "other adapters";
pub(super) const CHECKPOINTS: &str = "other checkpoints";
pub(super) const MODELS: &str = "whole models";
pub(super) const CONVERTERS: &str = "tensors of an old converter that change nothing";
pub(super) const RECORD: &str = "the record of the training";
pub(super) const UNKNOWN: &str = "not known";
const MODEL_FILES: &str = "files of a model";

/// What transformers and llama.cpp call the files of a tokenizer, a chat template and the settings of generation; in a plain LoRA
/// directory also the model card, and what was measured with the adapter.
const CARRIED: &str = "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json merges.txt \
     vocab.txt tokenizer.model spiece.model sentencepiece.bpe.model chat_template.jinja chat_template.json \
     generation_config.json README.md fit.json calibration.json";

/// Parts of names of what trainers leave: transformers, TRL, accelerate, DeepSpeed, LLaMA-Factory, axolotl, mlx-lm, this project.
/// One that ends in `*` begins a name, another is all of it.
const TRAINING: &str = "optimizer.* optimizer_* scheduler.* scaler.* rng_state* random_states_* trainer_state.json \
     training_args.* training_arguments.* trainer_log* trainer_config* train_results.json all_results.json eval_results.json \
     predict_results.json generated_predictions.jsonl training_loss* training_eval_loss* running_log* llamaboard_config* \
     training_progress* loss_history* run.toml metrics.jsonl metrics.json report.html events.out.tfevents* \
     zero_to_fp32.py latest custom_checkpoint_* sampler.* dataset_info.json all_configs* accelerator_config* \
     debug.log wandb* config.yaml config.yml lora_config.yaml train.log log.txt .lock .partial-*";

/// What warnings and `template_variables` come from, and only where it lies.
const OWN_RECORD: &str = "run.json";

/// The same as [`TRAINING`] for directories.
const TRAINING_DIRS: &str = "tb runs logs log wandb mlruns lightning_logs tensorboard global_step* optimizer* \
     pytorch_model_fsdp* profiler plots eval_results .partial-* __pycache__";

/// Files of a repository, whose names may begin so.
const REPOSITORIES: &str = "README* readme* LICENSE* LICENCE* license* NOTICE* USE_POLICY* CHANGELOG* CITATION* .git* \
     .gitattributes .cache* .huggingface* .DS_Store Thumbs.db ._* .locks* .ipynb_checkpoints .msc .mv .mdl";

/// Other files of a model directory.
const OF_MODELS: &str = "config.json preprocessor_config.json processor_config.json video_preprocessor_config.json \
     image_processor_config.json modules.json params.json configuration.json *.index.json";

/// What the file called `name` is by its name.
pub(super) fn file(name: &str) -> Known {
    if is_among(CARRIED, name) {
        return Known::Carried;
    }
    let lists = [
        (OWN_RECORD, RECORD),
        (TRAINING, BY_PRODUCTS),
        (REPOSITORIES, REPOSITORY),
        (OF_MODELS, MODEL_FILES),
    ];
    let known = lists.iter().find(|(list, _)| is_among(list, name));
    match known {
        Some((_, what)) => Known::LeftOut(what),
        None if is_weights(name) => Known::Weights,
        None if is_picture_or_log(name) => Known::LeftOut(BY_PRODUCTS),
        None => Known::LeftOut(UNKNOWN),
    }
}

/// What the directory at `path` is, by its name and by what stands in it.
pub(super) fn directory(name: &str, path: &Path) -> Known {
    if name == "additional_chat_templates" {
        return Known::Carried;
    }
    if path.join(CONFIG_FILE).is_file() {
        let is_checkpoint = checkpoint_number(name).is_some() || name == "best";
        return Known::LeftOut(match is_checkpoint {
            true => CHECKPOINTS,
            false => OTHER_ADAPTERS,
        });
    }
    if is_among(TRAINING_DIRS, name) {
        return Known::LeftOut(BY_PRODUCTS);
    }
    if is_among(REPOSITORIES, name) {
        return Known::LeftOut(REPOSITORY);
    }
    let config = json::read_object(&path.join("config.json"));
    if config.is_ok_and(|keys| keys.contains_key("model_type")) {
        return Known::LeftOut(MODELS);
    }
    if checkpoint_number(name).is_some() {
        return Known::LeftOut(BY_PRODUCTS);
    }
    Known::Weights
}

/// N of `checkpoint-N`.
pub(crate) fn checkpoint_number(name: &str) -> Option<u64> {
    name.strip_prefix("checkpoint-")?.parse().ok()
}

/// Whether a file of this name may hold weights.
pub(super) fn is_weights(name: &str) -> bool {
    const ENDINGS: &str =
        "safetensors bin pt pth ckpt gguf npz npy h5 hdf5 msgpack onnx pkl pickle distcp ot ggml";
    let ending = name
        .rsplit_once('.')
        .map(|(_, ending)| ending.to_ascii_lowercase());
    ending.is_some_and(|ending| ENDINGS.split(' ').any(|known| known == ending))
}

fn is_picture_or_log(name: &str) -> bool {
    [".png", ".svg", ".log"]
        .iter()
        .any(|end| name.ends_with(end))
}

/// Whether one of the words of `list` is `name`, or a beginning or an ending of it if it has a `*` there.
fn is_among(list: &str, name: &str) -> bool {
    list.split_whitespace().any(
        |word| match (word.strip_suffix('*'), word.strip_prefix('*')) {
            (Some(beginning), _) => name.starts_with(beginning),
            (None, Some(ending)) => name.ends_with(ending),
            (None, None) => name == word,
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_known_by_their_beginning_ending_or_whole() {
        for (name, expected) in [
            ("tokenizer.model", Known::Carried),
            ("optimizer.pt", Known::LeftOut(BY_PRODUCTS)),
            ("optimizer.safetensors", Known::LeftOut(BY_PRODUCTS)),
            ("rng_state_3.pth", Known::LeftOut(BY_PRODUCTS)),
            ("training_args.bin", Known::LeftOut(BY_PRODUCTS)),
            ("loss.png", Known::LeftOut(BY_PRODUCTS)),
            (".gitattributes", Known::LeftOut(REPOSITORY)),
            ("LICENSE.txt", Known::LeftOut(REPOSITORY)),
            ("config.json", Known::LeftOut(MODEL_FILES)),
            ("model.safetensors.index.json", Known::LeftOut(MODEL_FILES)),
            ("notes.txt", Known::LeftOut(UNKNOWN)),
            ("value_head.bin", Known::Weights),
            ("New.SafeTensors", Known::Weights),
            ("non_lora_trainables.bin", Known::Weights),
        ] {
            assert_eq!(file(name), expected, "{name}");
        }
        assert_eq!(checkpoint_number("checkpoint-120"), Some(120));
        assert_eq!(checkpoint_number("checkpoint-final"), None);
    }
}
