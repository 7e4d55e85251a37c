//! LoRA-FA (Zhang et al. 2023, arXiv:2308.03303): LoRA with A frozen at its initial value.

use std::sync::Arc;

use super::lora::Lora;
use super::{DIVERGENCES, Export, Group, Kind};

pub(super) static KIND: Kind = Kind {
    name: "lora-fa",
    about: "LoRA with A frozen at its initial value.",
    metrics: DIVERGENCES,
    export: Export::PlainLora,
    unread: &[],
    new: |_| {
        Ok(Arc::new(Lora {
            kind: &KIND,
            group_of_a: Group::Frozen,
        }))
    },
};
