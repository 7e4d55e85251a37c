//! Module paths as wrappers leave them in the names of tensors: which wrapper it was, and the path without it.

use crate::problem::Problem;

/// Segments that a wrapper puts in a module's path, and the wrapper. No model has modules of these names.
const WRAPPERS: [(&str, &str); 9] = [
    ("_orig_mod", "torch.compile"),
    ("_checkpoint_wrapped_module", "activation checkpointing"),
    ("_fsdp_wrapped_module", "FSDP"),
    ("_fpw_module", "FSDP"),
    ("_forward_module", "Lightning Fabric"),
    ("_offload_wrapped_module", "activation offloading"),
    ("module", "DataParallel, DeepSpeed or Accelerate"),
    ("pretrained_model", "TRL's model with a value head"),
    ("base_model.model", "PEFT, applied twice"),
];

/// Wrappers that are told from a model's own module only at the front of a path.
const AT_THE_FRONT: [&str; 3] = ["module", "pretrained_model", "base_model.model"];

/// What in a model holds the layers of text beside those of other media.
const TEXT_MODEL: &str = "language_model";

/// A wrapper's segment in a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Wrapper {
    /// The segment, such as `_orig_mod`.
    pub(crate) segment: &'static str,
    /// Who puts it there.
    pub(crate) made_by: &'static str,
}

/// `path` without the segments of wrappers, and the wrappers in the order of their segments.
pub(crate) fn unwrapped(path: &str) -> (String, Vec<Wrapper>) {
    let mut found = Vec::new();
    let mut rest = path;
    let mut plain = String::with_capacity(path.len());
    while !rest.is_empty() {
        let wrapper = WRAPPERS.iter().find(|(segment, _)| {
            let is_next = rest
                .strip_prefix(segment)
                .is_some_and(|after| after.starts_with('.'));
            is_next && (plain.is_empty() || !AT_THE_FRONT.contains(segment))
        });
        if let Some((segment, made_by)) = wrapper {
            found.push(Wrapper { segment, made_by });
            rest = &rest[segment.len() + 1..];
            continue;
        }
        let end = rest.find('.').map_or(rest.len(), |at| at + 1);
        plain.push_str(&rest[..end]);
        rest = &rest[end..];
    }
    (plain, found)
}

/// What modules of a base are called in place of `path`, if the two differ in front of the layers alone: the text model
/// inside one for several media, or a model without its head.
pub(crate) fn other_front<'a>(
    path: &'a str,
    names: impl Iterator<Item = &'a str>,
) -> Option<&'a str> {
    let of = |path: &'a str| path.split_once("layers.");
    let (front, rest) = of(path)?;
    for name in names {
        if let Some((other, same)) = of(name)
            && same == rest
            && other != front
        {
            return Some(name);
        }
    }
    None
}

/// What stands in front of a layer's number in `name`, `layers.` included; the number; and what follows behind its dot.
pub(crate) fn layer_of(name: &str) -> Option<(&str, usize, &str)> {
    let start = name.find("layers.")? + "layers.".len();
    let (number, after) = name[start..].split_once('.')?;
    Some((&name[..start], number.parse().ok()?, after))
}

/// What stands before the layers of `path`, with its dot.
pub(crate) fn front(path: &str) -> &str {
    path.find("layers.").map_or("", |at| &path[..at])
}

/// What kind of base has modules called `path`, where that is no causal language model by itself.
pub(crate) fn base_of(path: &str) -> Option<&'static str> {
    if path.split('.').any(|segment| segment == TEXT_MODEL) {
        return Some("a model for text and other media, in which the language model is one part");
    }
    path.starts_with("layers.")
        .then_some("a model without a head (AutoModel)")
}

/// One problem for all of `names`, which have one cause.
pub(crate) fn one_for_all(
    code: &'static str,
    names: &[String],
    message: impl Into<String>,
    fix: impl Into<String>,
) -> Option<Problem> {
    let first = names.first()?;
    let at = match names.len() - 1 {
        0 => first.clone(),
        n => format!("{first} (and {n} more)"),
    };
    Some(Problem::new(code, at, message, fix))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(path: &str) -> (String, Vec<&'static str>) {
        let (plain, wrappers) = unwrapped(path);
        let segments = wrappers.iter().map(|wrapper| wrapper.segment).collect();
        (plain, segments)
    }

    #[test]
    fn wrappers_are_taken_out_wherever_they_stand() {
        let module = "model.layers.0.self_attn.q_proj";
        for (path, wrappers) in [
            ("model.layers.0.self_attn.q_proj", vec![]),
            (
                "_orig_mod.model.layers.0.self_attn.q_proj",
                vec!["_orig_mod"],
            ),
            (
                "model.layers.0._checkpoint_wrapped_module.self_attn.q_proj",
                vec!["_checkpoint_wrapped_module"],
            ),
            (
                "module.base_model.model.model.layers.0._orig_mod.self_attn._fsdp_wrapped_module.q_proj",
                vec![
                    "module",
                    "base_model.model",
                    "_orig_mod",
                    "_fsdp_wrapped_module",
                ],
            ),
            (
                "base_model.model.base_model.model.model.layers.0.self_attn.q_proj",
                vec!["base_model.model"; 2],
            ),
        ] {
            assert_eq!(plain(path), (module.to_owned(), wrappers), "{path}");
        }
        // A model's own modules keep their names.
        for path in [
            "model.module.layers.0.q_proj",
            "model.layers.0._orig_mod_2.q_proj",
            "modules.0",
            "module",
            "",
        ] {
            assert_eq!(plain(path), (path.to_owned(), vec![]), "{path}");
        }
    }

    #[test]
    fn another_front_is_found_by_what_follows_the_layers() {
        let base = ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"];
        let other = |path| other_front(path, base.into_iter());
        assert_eq!(
            other("model.language_model.layers.1.mlp.up_proj"),
            Some(base[1])
        );
        assert_eq!(other("layers.0.mlp.up_proj"), Some(base[0]));
        assert_eq!(other("model.layers.0.mlp.up_proj"), None);
        assert_eq!(other("model.layers.2.mlp.up_proj"), None);
        assert_eq!(other("lm_head"), None);
        assert!(
            base_of("model.language_model.layers.1.mlp.up_proj")
                .is_some_and(|base| base.contains("media"))
        );
        assert!(base_of("layers.0.mlp.up_proj").is_some_and(|base| base.contains("AutoModel")));
        assert_eq!(base_of(base[0]), None);
        assert_eq!(
            front("model.language_model.layers.1.x"),
            "model.language_model."
        );
    }
}
