//! Names of tensors in a PEFT directory: the module and the role of each, or the problem with it.

use std::collections::BTreeMap;

use super::read::{PREFIX, SAVE_AGAIN};
use super::stored::Whole;
use crate::formats::ReadOptions;
use crate::module_path::{Wrapper, one_for_all, unwrapped};
use crate::problem::Problem;
use crate::tensors::shards::ShardSet;
use crate::tensors::tensor::Tensor;

pub(super) const SAMPLER: &str = "lora_monteclora_sampler";

/// A tensor's role in a module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Role {
    A,
    B,
    /// DoRA's magnitude.
    Magnitude,
    /// AdaLoRA's singular values.
    E,
    /// SSF's scale and shift.
    Scale,
    Shift,
    /// Places and values of single entries.
    Indices,
    Values,
    LogStd,
    LogConcentration,
    LastCovariance,
    LastWeights,
}

impl Role {
    /// Those of MonteCLoRA's sampler.
    pub(crate) const SAMPLER: [Self; 4] = [
        Self::LogStd,
        Self::LogConcentration,
        Self::LastCovariance,
        Self::LastWeights,
    ];
}

/// The sampler's tensors by PEFT's names.
pub(crate) const SAMPLER_FIELDS: [(&str, Role); 4] = [
    ("std_prior", Role::LogStd),
    ("expert_weights_prior", Role::LogConcentration),
    ("gaussian_var_prior", Role::LastCovariance),
    ("expert_weights", Role::LastWeights),
];

/// Tensors whose name is whole, without a field.
const BARE: [(&str, Role); 8] = [
    ("lora_A", Role::A),
    ("lora_B", Role::B),
    ("lora_E", Role::E),
    ("lora_magnitude_vector", Role::Magnitude),
    ("ssf_scale", Role::Scale),
    ("ssf_shift", Role::Shift),
    ("sparse_indices", Role::Indices),
    ("sparse_values", Role::Values),
];

/// Stands for the field of a name without one.
const BARE_FIELD: &str = "";

/// What the names of an adapter's tensors begin with, below the module.
const STEMS: [&str; 3] = ["lora_", "ssf_", "sparse_"];

/// The tensors of one module, by role, with their full names.
pub(super) type Parts = BTreeMap<Role, (String, Tensor)>;

/// Every tensor of the adapter, by module and role.
#[derive(Debug, Default)]
pub(super) struct Sorted {
    pub(super) sites: BTreeMap<String, Parts>,
    /// Whole weights: the tensor's name, and the name of the base's weight.
    pub(super) stored: Vec<(String, Whole)>,
    /// Names of tensors that a wrapper changed, by wrapper.
    wrapped: BTreeMap<Wrapper, Vec<String>>,
    /// Names of tensors that contain the adapter's name more than once.
    named_twice: Vec<String>,
    /// Names of tensors without PEFT's prefix.
    foreign: Vec<String>,
}

/// Assigns every tensor to its module and role, or reports why it has none.
pub(super) fn sort_tensors(
    weights: &ShardSet,
    with_posterior: bool,
    problems: &mut Vec<Problem>,
) -> Sorted {
    let mut sorted = Sorted::default();
    for name in weights.names() {
        if !with_posterior && is_of_authors_sampler(name) {
            continue;
        }
        let found = match place(name) {
            Ok(found) => found,
            Err(problem) => {
                problems.push(problem);
                continue;
            }
        };
        for wrapper in found.wrappers {
            let names = sorted.wrapped.entry(wrapper).or_default();
            names.push(name.to_owned());
        }
        let (module, role) = match found.place {
            Place::Foreign => {
                sorted.foreign.push(name.to_owned());
                continue;
            }
            Place::Whole(whole) => {
                sorted.stored.push((name.to_owned(), whole));
                continue;
            }
            Place::Part {
                module,
                role,
                is_named_twice,
            } => {
                if is_named_twice {
                    sorted.named_twice.push(name.to_owned());
                }
                (module, role)
            }
        };
        let tensor = weights.get(name).map(|tensor| (name.to_owned(), tensor));
        let parts = sorted.sites.entry(module).or_default();
        if let Some((other, _)) = tensor.and_then(|tensor| parts.insert(role, tensor)) {
            let message = format!("stands for the same tensor as {other}");
            let fix = "save one adapter alone";
            problems.push(Problem::new("ambiguous", name, message, fix));
        }
    }
    sorted
}

/// Refuses names by which no program would find a module. With [`ReadOptions::unwrap`], notes what was left out of them
/// instead.
pub(super) fn check_names(
    sorted: &Sorted,
    options: &ReadOptions<'_>,
    notes: &mut Vec<String>,
    problems: &mut Vec<Problem>,
) {
    const PLAIN: &str = "monteclora convert ADAPTER -o DIR --to lora writes the names without it";
    let mut say = |code, names: &[String], what: String| {
        if options.unwrap {
            let n = names.len();
            notes.extend((n > 0).then(|| format!("{what}; left out of the names of {n} tensors")));
        } else {
            let message = format!(
                "{what}; no model has modules of such names, so that nothing would be loaded"
            );
            problems.extend(one_for_all(code, names, message, PLAIN));
        }
    };
    for (Wrapper { segment, made_by }, names) in &sorted.wrapped {
        let what = format!("`{segment}.` in the name comes from a wrapper: {made_by}");
        say("wrapped-name", names, what);
    }
    let what = "the adapter's name stands more than once in the name".to_owned();
    say("wrapped-name", &sorted.named_twice, what);
    let message = "does not start with base_model.model., so it is not PEFT's";
    let fix = "save the adapter with PEFT (save_pretrained), or give the tool's own directory where that is a format that is read";
    problems.extend(one_for_all("unknown-tensor", &sorted.foreign, message, fix));
}

/// Whether the tensor belongs to the sampler of the authors' own code.
fn is_of_authors_sampler(name: &str) -> bool {
    name.split('.').any(|part| part.starts_with("mc_sampler"))
}

/// Parts of refused names, each with the code of the refusal, its message and its fix. A part with a leading dot
/// matches only at the start of a component.
const REFUSED_PARTS: &str = "\
.lora_embedding_ | embedding | LoRA on an embedding | train without adapting embeddings
trainable_tokens | trainable-tokens | trained token embeddings | train without trainable_token_indices
token_adapter | trainable-tokens | trained token embeddings | train without trainable_token_indices
.mc_sampler | unknown-tensor | the sampler of the authors' code, whose noise has another scale than PEFT's | use its mean: monteclora convert ADAPTER -o DIR --from lora --to lora leaves the sampler out";

/// Where a tensor belongs.
enum Place {
    /// To a module's adapter.
    Part {
        module: String,
        role: Role,
        is_named_twice: bool,
    },
    /// Stored beside the adapter.
    Whole(Whole),
    /// To something that is not PEFT's.
    Foreign,
}

/// A tensor's place, and the wrappers around its module.
struct Found {
    place: Place,
    wrappers: Vec<Wrapper>,
}

/// Returns the place of the tensor named `name`.
fn place(name: &str) -> Result<Found, Problem> {
    let refuse = |code, message: &str, fix: &str| Err(Problem::new(code, name, message, fix));
    let components: Vec<&str> = name.split('.').collect();
    if components.iter().any(|part| part.is_empty())
        || name.contains(['/', '\\'])
        || name.chars().any(char::is_control)
    {
        return refuse("tensor-name", "not the name of a tensor", SAVE_AGAIN);
    }
    let dotted = format!(".{name}");
    for row in REFUSED_PARTS.lines() {
        if let [part, code, message, fix] = row.split(" | ").collect::<Vec<_>>()[..]
            && dotted.contains(part)
        {
            return refuse(code, message, fix);
        }
    }
    // A wrapper around PEFT comes before PEFT's prefix, and a wrapper around the base comes after it.
    let (outer, rest) = name.split_once(PREFIX).unwrap_or((name, ""));
    let (plain_outer, mut wrappers) = unwrapped(outer);
    if rest.is_empty() || !plain_outer.is_empty() {
        let place = Place::Foreign;
        return Ok(Found {
            place,
            wrappers: Vec::new(),
        });
    }
    let (path, inner) = unwrapped(rest);
    wrappers.extend(inner);
    wrappers.sort_unstable();
    wrappers.dedup();
    let parts: Vec<&str> = path.split('.').collect();
    let Some(at) = parts
        .iter()
        .rposition(|part| STEMS.iter().any(|stem| part.starts_with(stem)))
    else {
        let place = Place::Whole(Whole::of(&path));
        return Ok(Found { place, wrappers });
    };
    let module = parts[..at].join(".");
    // The adapter's name may come between them once, as in `lora_A.default.weight`.
    let (field, is_named_twice) = match &parts[at + 1..] {
        [] => (BARE_FIELD, false),
        [field] | [_, field] => (*field, false),
        [name, others @ .., field] if others.iter().all(|other| other == name) => (*field, true),
        _ => ("?", false),
    };
    let role = match (parts[at], field) {
        (stem, BARE_FIELD) => BARE
            .iter()
            .find(|(name, _)| *name == stem)
            .map(|(_, role)| *role),
        ("lora_magnitude_vector", "weight") => Some(Role::Magnitude),
        ("lora_A", "weight") => Some(Role::A),
        ("lora_B", "weight") => Some(Role::B),
        ("lora_A" | "lora_B", "bias") => {
            let fix = "train with lora_bias=False";
            return refuse("bias", "a bias of the adapter", fix);
        }
        (SAMPLER, field) => SAMPLER_FIELDS
            .iter()
            .find(|(known, _)| *known == field)
            .map(|(_, role)| *role),
        _ => None,
    };
    if module.split('.').any(|part| part == "base_layer") && !module.contains("experts") {
        let message = "an adapter inside another adapter's layer (base_layer)";
        return refuse(
            "nested-adapter",
            message,
            "merge the inner adapter into the base with PEFT (merge_and_unload), and train on the result",
        );
    }
    match role {
        Some(role) if !module.is_empty() => Ok(Found {
            place: Place::Part {
                module,
                role,
                is_named_twice,
            },
            wrappers,
        }),
        _ => refuse(
            "unknown-tensor",
            "not understood",
            "only LoRA and MonteCLoRA on linear layers can be converted",
        ),
    }
}
