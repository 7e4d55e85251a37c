//! OLMo 2: norms after the sublayers instead of before them, and on all query heads and all key heads together.

use super::family::{Bias, Defaults, Extent, Family, Gguf, Norm, NormPlace, Role, separate};
use super::gemma2;

pub(super) const FAMILY: Family = Family {
    model_type: "olmo2",
    class_name: "Olmo2ForCausalLM",
    defaults: Defaults {
        rms_norm_eps: 1e-5,
        ..Family::PLAIN.defaults
    },
    projections: &separate(
        Bias::Key("attention_bias"),
        Bias::Key("attention_bias"),
        Bias::No,
    ),
    norms: &NORMS,
    gguf: Gguf {
        architecture: "olmo2",
        ..Family::PLAIN.gguf
    },
    ..Family::PLAIN
};

const NORMS: [Norm; 4] = {
    let [_, after, _, after_feed_forward] = gemma2::SANDWICH;
    [
        after,
        after_feed_forward,
        Norm {
            name: "self_attn.q_norm",
            gguf_name: "attn_q_norm",
            place: NormPlace::On(Role::Query, Extent::Whole),
        },
        Norm {
            name: "self_attn.k_norm",
            gguf_name: "attn_k_norm",
            place: NormPlace::On(Role::Key, Extent::Whole),
        },
    ]
};
