//! Rotary embeddings: what the file says, read as llama.cpp reads it, and Llama 3's parameters recovered from its frequency factors.

use serde_json::{Map, Value, json};

use super::keys::Keys;
use crate::architecture::{
    Family, Llama3Scaling, LongRopeScaling, RopeKind, RotaryLayers, YarnScaling,
};

/// Llama 3's factors by which frequencies are divided.
const FACTORS: &str = "rope_freqs.weight";
/// LongRoPE's, for long sequences and for short ones.
const LONG_FACTORS: [&str; 2] = ["rope_factors_long.weight", "rope_factors_short.weight"];

/// Tensors that are read as rotary scaling.
pub(super) const TENSORS: [&str; 3] = [FACTORS, LONG_FACTORS[0], LONG_FACTORS[1]];

const KIND: &str = "rope.scaling.type";
const FACTOR: &str = "rope.scaling.factor";
const ORIGINAL: &str = "rope.scaling.original_context_length";
const ATTENTION_FACTOR: &str = "rope.scaling.attn_factor";

/// Sizes on which a scaling depends.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sizes {
    pub(super) head_dim: usize,
    /// Entries of a head that turn.
    pub(super) rotated: usize,
    pub(super) context_length: usize,
}

/// The rotary embedding of a model in the words of config.json.
pub(super) struct Rotary {
    pub(super) kind: RopeKind,
    /// The keys of config.json.
    pub(super) fields: Map<String, Value>,
}

/// Reads the rotary embedding of a model of `family`.
pub(super) fn read(keys: &mut Keys<'_>, family: &Family, sizes: Sizes) -> Rotary {
    // llama.cpp's default for files that do not say.
    let theta = keys.positive("rope.freq_base", Some(10_000.0));
    let kind = kind(keys, sizes, theta);
    let mut scaling = kind.scaling_json();
    let mut fields = Map::new();
    if family.rotary.scales_queries {
        // The number of positions after which queries grow is the one that YaRN starts from.
        match &mut scaling {
            Value::Object(scaling) if matches!(kind, RopeKind::Yarn(_)) => {
                let beta = keys.positive("attention.temperature_scale", None);
                scaling.insert("llama_4_scaling_beta".to_owned(), beta.into());
            }
            _ => {
                let message =
                    "queries that grow with their position are supported together with YaRN only";
                keys.refuse("rope_scaling", "attention.temperature_scale", message);
            }
        }
    }
    if family.defaults.original_max_position_embeddings.is_some()
        && let (RopeKind::LongRope(longrope), Value::Object(scaling)) = (&kind, &mut scaling)
    {
        // These classes have the length beside the factors, and older readers take these three fields alone.
        scaling.shift_remove("original_max_position_embeddings");
        scaling.shift_remove("rope_type");
        scaling.insert("type".to_owned(), "longrope".into());
        let length = longrope.original_max_position_embeddings;
        fields.insert("original_max_position_embeddings".to_owned(), length.into());
    }
    if family.rotary.partial.is_some() {
        let share = share(sizes.rotated, sizes.head_dim);
        fields.insert("partial_rotary_factor".to_owned(), share.into());
    }
    // transformers >= 5 converts a top-level rope_theta and rope_scaling, and older readers know nothing else.
    let plain = [("rope_theta", theta.into()), ("rope_scaling", scaling)];
    match family.rotary.layers {
        RotaryLayers::ByWindow { key, .. } => {
            let local = family.gguf.local_theta.unwrap_or(theta);
            let local = keys.positive("rope.freq_base_swa", Some(local));
            if matches!(kind, RopeKind::LongRope(_)) {
                let message = "factors for each frequency are not supported where layers with a window have a rotation of their own";
                keys.findings
                    .problem("rope_scaling", LONG_FACTORS[0], message, "");
            }
            match key {
                Some(key) => {
                    fields.extend(plain.map(|(key, value)| (key.to_owned(), value)));
                    fields.insert(key.to_owned(), local.into());
                }
                None => {
                    let [_, (_, full)] = plain;
                    let by_layer = json!({
                        "full_attention": with_theta(full, theta),
                        "sliding_attention": with_theta(Value::Null, local),
                    });
                    fields.insert("rope_parameters".to_owned(), by_layer);
                }
            }
        }
        RotaryLayers::All | RotaryLayers::Marked { .. } => {
            fields.extend(plain.map(|(key, value)| (key.to_owned(), value)));
        }
    }
    Rotary { kind, fields }
}

/// A scaling with its base, as `rope_parameters` has it.
fn with_theta(scaling: Value, theta: f64) -> Value {
    let mut fields = match scaling {
        Value::Object(fields) => fields,
        _ => Map::from_iter([("rope_type".to_owned(), "default".into())]),
    };
    fields.insert("rope_theta".to_owned(), theta.into());
    fields.into()
}

/// The share of a head that turns, such that its product with the head's size, cut to a whole number, is `rotated`.
fn share(rotated: usize, head_dim: usize) -> f64 {
    let share = rotated as f64 / head_dim as f64;
    match (head_dim as f64 * share) as usize == rotated {
        true => share,
        false => share.next_up(),
    }
}

/// Reads how the frequencies are rescaled. As in llama.cpp, a file that gives no type means `linear`.
fn kind(keys: &mut Keys<'_>, sizes: Sizes, theta: f64) -> RopeKind {
    let llama3 = llama3(keys, sizes, theta);
    let has_long_factors =
        LONG_FACTORS.map(|name| keys.source.tensor(name).is_some()) != [false; 2];
    let (has_kind, said) = (keys.has(KIND), keys.text(KIND));
    let is_longrope = said == Some("longrope") || (!has_kind && has_long_factors);
    let kind = match said {
        _ if is_longrope => longrope(keys, sizes),
        Some("none") => RopeKind::Default,
        Some("linear") => linear(keys),
        None if !has_kind => linear(keys),
        Some("yarn") => yarn(keys, sizes),
        kind => {
            let message = match kind {
                Some(kind) => format!("rotary scaling `{kind}` is not supported"),
                None => "the type of rotary scaling is not a string".to_owned(),
            };
            let fix = "supported: none, linear, yarn, longrope, and Llama 3's frequency factors";
            let at = keys.full(KIND);
            keys.findings.problem("rope_scaling", at, message, fix);
            RopeKind::Default
        }
    };
    if has_long_factors && !is_longrope {
        let message = "long and short factors, but the file says another scaling";
        keys.findings
            .problem("rope_scaling", LONG_FACTORS[0], message, "");
    }
    match (kind, llama3) {
        (kind, None) => kind,
        (RopeKind::Default, Some(scaling)) => RopeKind::Llama3(scaling),
        (kind, Some(_)) => {
            let what = match &kind {
                RopeKind::Linear { factor } => format!("a factor of {factor} for all"),
                kind => format!("{} scaling", kind.name()),
            };
            let message = format!("frequency factors together with {what}");
            keys.findings.problem("rope_scaling", FACTORS, message, "");
            RopeKind::Default
        }
    }
}

/// The factor for all frequencies; a file without one is asked for that of older files, and 0 is none.
fn factor(keys: &mut Keys<'_>) -> Option<(&'static str, f64)> {
    let key = [FACTOR, "rope.scale_linear"]
        .into_iter()
        .find(|key| keys.has(key))?;
    match keys.source.number(&keys.full(key)) {
        Some(factor) if factor > 0.0 && factor.is_finite() => Some((key, factor)),
        Some(0.0) => None,
        _ => {
            keys.refuse("rope_scaling", key, "is not a positive number");
            None
        }
    }
}

fn linear(keys: &mut Keys<'_>) -> RopeKind {
    let Some((key, factor)) = factor(keys).filter(|(_, factor)| *factor != 1.0) else {
        return RopeKind::Default;
    };
    if !keys.has(KIND) {
        let key = keys.full(key);
        keys.findings.note(format!(
            "{key} is {factor} without a type: read as linear, as llama.cpp does"
        ));
    }
    RopeKind::Linear { factor }
}

/// YaRN. llama.cpp's defaults are transformers', but that of the original length; its ramp has whole bounds.
fn yarn(keys: &mut Keys<'_>, sizes: Sizes) -> RopeKind {
    let Some((_, factor)) = factor(keys).filter(|(_, factor)| *factor != 1.0) else {
        return RopeKind::Default;
    };
    const MIX: &str = "rope.scaling.yarn_ext_factor";
    // Below 0 is the 1 that YaRN has.
    let mix = keys.has(MIX).then(|| keys.source.number(&keys.full(MIX)));
    if mix.is_some_and(|mix| !mix.is_some_and(|mix| mix < 0.0 || mix == 1.0)) {
        keys.refuse("rope_scaling", MIX, "only 1 is supported");
    }
    let original = original(keys, sizes);
    let mut turns = |key: &str, default: f64| keys.above_0(key).unwrap_or(default);
    let (beta_fast, beta_slow) = (
        turns("rope.scaling.yarn_beta_fast", 32.0),
        turns("rope.scaling.yarn_beta_slow", 1.0),
    );
    RopeKind::Yarn(YarnScaling {
        factor,
        original_max_position_embeddings: original,
        beta_fast,
        beta_slow,
        truncate: true,
        attention_factor: keys.above_0("rope.scaling.yarn_attn_factor"),
        // llama.cpp keeps the second of the two alone, and takes 1 for the first.
        mscales: keys
            .above_0("rope.scaling.yarn_log_multiplier")
            .map(|all| (1.0, all)),
    })
}

/// Positions the model was trained on first.
fn original(keys: &mut Keys<'_>, sizes: Sizes) -> usize {
    keys.dimension_above_0(ORIGINAL).unwrap_or_else(|| {
        let key = keys.full(ORIGINAL);
        let length = sizes.context_length;
        keys.findings.note(format!(
            "{key} is absent: taken as the context length, {length}, as llama.cpp does"
        ));
        length
    })
}

/// LongRoPE, whose factors are tensors. transformers takes the lengths' relation for what attention is multiplied by; another number of
/// the file is written down.
fn longrope(keys: &mut Keys<'_>, sizes: Sizes) -> RopeKind {
    let factors = LONG_FACTORS.map(|name| factors_of(keys, name, sizes));
    let original = original(keys, sizes);
    let stated = keys.above_0(ATTENTION_FACTOR).unwrap_or(1.0);
    let [Some(long), Some(short)] = factors else {
        return RopeKind::Default;
    };
    let exact = |factors: Vec<f32>| factors.into_iter().map(decimal).collect();
    let mut scaling = LongRopeScaling {
        short_factor: exact(short),
        long_factor: exact(long),
        factor: None,
        original_max_position_embeddings: original,
        attention_factor: None,
    };
    let inferred = scaling.inferred_attention_factor(sizes.context_length);
    if (stated - inferred).abs() > 1e-4 {
        scaling.attention_factor = Some(stated);
    }
    RopeKind::LongRope(scaling)
}

/// The shortest decimal that denotes a float32.
fn decimal(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}

/// A factor for each frequency; nothing, and a problem, where they are missing or misshapen.
fn factors_of(keys: &mut Keys<'_>, name: &str, sizes: Sizes) -> Option<Vec<f32>> {
    let n_factors = sizes.rotated / 2;
    let tensor = keys.source.tensor(name);
    let factors = tensor.and_then(|tensor| tensor.floats());
    let is_sound = |factors: &Vec<f32>| {
        factors.len() == n_factors && factors.iter().all(|x| x.is_finite() && *x > 0.0)
    };
    if let Some(factors) = factors.filter(is_sound) {
        return Some(factors);
    }
    let message = format!("expected {n_factors} positive float32 frequency factors");
    keys.findings.problem("rope_scaling", name, message, "");
    None
}

/// llama.cpp stores Llama 3's scaling as the factors alone. Every published model has low 1, high 4 and an original
/// length of 8192; the factor is the last entry. Other lengths that are powers of two are tried after that one, and a guess is accepted
/// only if it reproduces all entries.
fn llama3(keys: &mut Keys<'_>, sizes: Sizes, theta: f64) -> Option<Llama3Scaling> {
    keys.source.tensor(FACTORS)?;
    let factors = factors_of(keys, FACTORS, sizes)?;
    if factors.iter().all(|factor| *factor == 1.0) {
        return None;
    }
    let agrees = |scaling: &Llama3Scaling| {
        let expected = scaling.factors(sizes.rotated, theta);
        let mut both = expected.iter().zip(&factors);
        both.all(|(expected, found)| (expected - f64::from(*found)).abs() <= 1e-4 * expected)
    };
    let lengths = [13].into_iter().chain(4..=20).map(|power| 1 << power);
    let mut guesses = lengths.map(|length| Llama3Scaling {
        factor: f64::from(factors.last().copied().unwrap_or(1.0)),
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: length,
    });
    let Some(scaling) = guesses.find(agrees) else {
        let message = "the frequency factors are not Llama 3's (low 1, high 4, original length a power of two such as 8192)";
        keys.findings.problem("rope_scaling", FACTORS, message, "");
        return None;
    };
    keys.findings.note(format!(
        "{FACTORS} is Llama 3's scaling with factor {} and original length {}: written as rope_scaling",
        scaling.factor, scaling.original_max_position_embeddings
    ));
    Some(scaling)
}
