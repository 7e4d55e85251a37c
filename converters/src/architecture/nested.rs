//! Multimodal models that contain a decoder: where they keep the decoder's configuration, and how they name its
//! tensors.
//!
//! Such a model's config.json has the decoder's configuration in `text_config`. Each tensor has two names: one in
//! files, and one of the module in memory, which PEFT uses for adapted modules. transformers accepts both names in
//! files; everything here works with the name in memory.

use std::borrow::Cow;

use serde_json::{Map, Value};

use super::{Family, gemma3, ministral3, mistral};

/// A multimodal model that contains a decoder.
#[derive(Debug)]
pub struct Wrapper {
    /// `model_type` of config.json.
    pub model_type: &'static str,
    /// The class of transformers, as `architectures` of config.json names it.
    pub class_name: &'static str,
    /// The families that the decoder may have. The first applies if `text_config` names none.
    pub families: &'static [&'static Family],
    /// Path of the decoder without its head, in the names of modules.
    pub body: &'static str,
    /// Pairs of prefixes: that of names in files, and that of the corresponding names of modules.
    pub stored: &'static [(&'static str, &'static str)],
    /// Prefixes of the names of modules for other media.
    pub beside: &'static [&'static str],
    /// Keys of config.json that concern other media.
    pub keys: &'static [&'static str],
    /// Keys of `text_config` that this class does not read although the decoder's own class does.
    pub unused: &'static [&'static str],
    /// `tie_word_embeddings` of config.json if the key is absent there; the value in `text_config` does not count.
    pub tie_word_embeddings: bool,
}

/// Every supported model of this kind.
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
    /// Returns the module's name for a name in a file.
    pub fn in_memory<'a>(&self, stored: &'a str) -> Cow<'a, str> {
        let mut known = self.stored.iter();
        let renamed =
            known.find_map(|(from, to)| Some(format!("{to}{}", stored.strip_prefix(from)?)));
        renamed.map_or(Cow::Borrowed(stored), Cow::Owned)
    }

    /// Returns the name that transformers writes to files for a module's name.
    pub fn on_disk<'a>(&self, name: &'a str) -> Cow<'a, str> {
        let mut known = self.stored.iter().rev();
        let renamed =
            known.find_map(|(to, from)| Some(format!("{to}{}", name.strip_prefix(from)?)));
        renamed.map_or(Cow::Borrowed(name), Cow::Owned)
    }

    /// Finds a wrapper whose decoder contains the module `name`. All such wrappers have the same names in files.
    pub(crate) fn with_module(name: &str) -> Option<&'static Self> {
        let mut known = WRAPPERS.iter().copied();
        known.find(|wrapper| {
            let rest = name.strip_prefix(wrapper.body);
            rest.is_some_and(|rest| rest.starts_with('.'))
        })
    }

    /// Finds a wrapper whose files have a tensor or module named `stored` that has another name in memory.
    pub(crate) fn with_stored(stored: &str) -> Option<&'static Self> {
        let mut known = WRAPPERS.iter().copied();
        known.find(|wrapper| wrapper.in_memory(stored) != stored)
    }

    /// Whether a module or tensor of this name belongs to other media.
    pub fn is_beside(&self, name: &str) -> bool {
        self.beside
            .iter()
            .any(|beginning| name.starts_with(beginning))
    }

    /// Finds the wrapper of a config.json by `model_type` or, if that is absent, by the class in `architectures`.
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
