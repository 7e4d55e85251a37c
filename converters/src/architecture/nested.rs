//! Models that hold a decoder beside parts for other media: where they keep its configuration and what they call its tensors.
//!
//! Such a model's config.json has the decoder's in `text_config`. Its tensors have two names each: the one in files, and the one of the
//! module in memory, by which PEFT names what it adapts. transformers reads both from files, and everything here works with the latter.

use std::borrow::Cow;

use serde_json::{Map, Value};

use super::{Family, gemma3, ministral3, mistral};

/// A model with a decoder in it.
#[derive(Debug)]
pub struct Wrapper {
    /// `model_type` of config.json.
    pub model_type: &'static str,
    /// The class of transformers, as `architectures` of config.json names it.
    pub class_name: &'static str,
    /// Families that the decoder may be of; the first is meant where `text_config` names none.
    pub families: &'static [&'static Family],
    /// Path of the decoder without its head, in the names of modules.
    pub body: &'static str,
    /// Beginnings of names in files, and of the names of modules that are meant by them.
    pub stored: &'static [(&'static str, &'static str)],
    /// Beginnings of the names of modules for other media.
    pub beside: &'static [&'static str],
    /// Keys of config.json about other media.
    pub keys: &'static [&'static str],
    /// Keys of `text_config` that this class does not read, though the decoder's own class does.
    pub unused: &'static [&'static str],
    /// `tie_word_embeddings` of config.json where that key is absent; the one in `text_config` does not count.
    pub tie_word_embeddings: bool,
}

/// Every model of this kind that is known.
pub const WRAPPERS: &[&Wrapper] = &[&MISTRAL3, &GEMMA3];

const MISTRAL3: Wrapper = Wrapper {
    model_type: "mistral3",
    class_name: "Mistral3ForConditionalGeneration",
    families: &[&mistral::FAMILY, &ministral3::FAMILY],
    body: "model.language_model",
    stored: &[
        ("language_model.model.", "model.language_model."),
        ("language_model.lm_head.", "lm_head."),
        ("vision_tower.", "model.vision_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    ],
    beside: &["model.vision_tower.", "model.multi_modal_projector."],
    keys: &[
        "vision_config",
        "image_token_index",
        "image_token_id",
        "projector_hidden_act",
        "vision_feature_layer",
        "multimodal_projector_bias",
        "spatial_merge_size",
    ],
    unused: &[],
    tie_word_embeddings: true,
};

const GEMMA3: Wrapper = Wrapper {
    model_type: "gemma3",
    class_name: "Gemma3ForConditionalGeneration",
    families: &[&gemma3::FAMILY],
    stored: &[
        ("language_model.model.", "model.language_model."),
        ("language_model.lm_head.", "lm_head."),
        ("vision_tower.vision_model.", "model.vision_tower."),
        ("vision_tower.", "model.vision_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    ],
    keys: &[
        "vision_config",
        "mm_tokens_per_image",
        "boi_token_index",
        "boi_token_id",
        "eoi_token_index",
        "eoi_token_id",
        "image_token_index",
        "image_token_id",
    ],
    unused: &["final_logit_softcapping"],
    ..MISTRAL3
};

impl Wrapper {
    /// The module's name for a name in a file.
    pub fn in_memory<'a>(&self, stored: &'a str) -> Cow<'a, str> {
        let mut known = self.stored.iter();
        let renamed =
            known.find_map(|(from, to)| Some(format!("{to}{}", stored.strip_prefix(from)?)));
        renamed.map_or(Cow::Borrowed(stored), Cow::Owned)
    }

    /// The name that transformers writes to files for a module's name.
    pub fn on_disk<'a>(&self, name: &'a str) -> Cow<'a, str> {
        let mut known = self.stored.iter().rev();
        let renamed =
            known.find_map(|(to, from)| Some(format!("{to}{}", name.strip_prefix(from)?)));
        renamed.map_or(Cow::Borrowed(name), Cow::Owned)
    }

    /// One whose decoder holds the module `name`: they agree in what its names are in files.
    pub(crate) fn with_module(name: &str) -> Option<&'static Self> {
        let mut known = WRAPPERS.iter().copied();
        known.find(|wrapper| {
            let rest = name.strip_prefix(wrapper.body);
            rest.is_some_and(|rest| rest.starts_with('.'))
        })
    }

    /// One whose files have a tensor or module of the name `stored`, which is another one in memory.
    pub(crate) fn with_stored(stored: &str) -> Option<&'static Self> {
        let mut known = WRAPPERS.iter().copied();
        known.find(|wrapper| wrapper.in_memory(stored) != stored)
    }

    /// Whether a module or tensor of this name is for other media.
    pub fn is_beside(&self, name: &str) -> bool {
        self.beside
            .iter()
            .any(|beginning| name.starts_with(beginning))
    }

    /// The one that a config.json is of, by `model_type`, or, where that is absent, by the class in `architectures`.
    pub(crate) fn of(config: &Map<String, Value>) -> Option<&'static Self> {
        let mut known = WRAPPERS.iter().copied();
        match config.get("model_type").filter(|value| !value.is_null()) {
            Some(model_type) => known.find(|wrapper| *model_type == wrapper.model_type),
            None => {
                let class = config.get("architectures")?.get(0)?;
                known.find(|wrapper| *class == wrapper.class_name)
            }
        }
    }
}

impl PartialEq for Wrapper {
    fn eq(&self, other: &Self) -> bool {
        self.model_type == other.model_type
    }
}
