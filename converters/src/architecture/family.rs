//! The words in which a decoder family is described.

use super::ModelShape;
use crate::module_path::layer_of;

/// A decoder family: everything about it that is not a number of one model.
#[derive(Debug)]
pub struct Family {
    /// `model_type` of config.json.
    pub model_type: &'static str,
    /// The class of transformers, as `architectures` of config.json names it.
    pub class_name: &'static str,
    /// What absent keys mean.
    pub defaults: Defaults,
    /// The linear modules of a block, in the order of checkpoints; fused ones keep their name.
    pub projections: &'static [Projection],
    /// The norms of a block.
    pub norms: &'static [Norm],
    /// What is added to the weight of every norm, the last one's too: 1 where a weight of 0 scales nothing.
    pub norm_offset: f32,
    /// The key that names the activation.
    pub activation_key: &'static str,
    /// Which layers see only a window.
    pub windows: Windows,
    /// How queries and keys are rotated.
    pub rotary: Rotary,
    /// Factors in the computation, and what each follows from.
    pub multipliers: &'static [(Multiplier, Factor)],
    /// Bounds on attention's scores and on logits.
    pub softcaps: &'static [Softcap],
    /// The mixture that takes the place of the feed-forward layer in some or all blocks.
    pub experts: Option<&'static Experts>,
    /// llama.cpp's side.
    pub gguf: Gguf,
    /// Keys that the server's runtime reads of this family's configuration besides the sizes that all have; what a key outside
    /// of these changes cannot be served. `None`: the runtime does not have the family.
    pub runtime_keys: Option<&'static [&'static str]>,
}

/// What transformers assumes where config.json is silent.
#[derive(Debug, Clone, Copy)]
pub struct Defaults {
    /// `num_key_value_heads`; `None` is the number of query heads, which a null always is.
    pub num_key_value_heads: Option<usize>,
    /// `head_dim`; `None` is the width divided by the heads, which a null always is.
    pub head_dim: Option<usize>,
    /// `max_position_embeddings`.
    pub max_position_embeddings: usize,
    /// `rms_norm_eps`.
    pub rms_norm_eps: f64,
    /// `rope_theta`.
    pub rope_theta: f64,
    /// `tie_word_embeddings`.
    pub tie_word_embeddings: bool,
    /// `sliding_window`; a null is always none.
    pub sliding_window: Option<usize>,
    /// The activation.
    pub activation: Activation,
    /// Whether there are the biases of which a key that is absent would tell; see [`Bias::Key`].
    pub biases: bool,
    /// `original_max_position_embeddings` beside the rotary parameters, where the class has such a key: it is the one that
    /// counts.
    pub original_max_position_embeddings: Option<usize>,
    /// Sizes, where published configurations leave out those of the class.
    pub sizes: Option<Sizes>,
}

/// Sizes of transformers' configuration class.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    /// `vocab_size`.
    pub vocab_size: usize,
    /// `hidden_size`.
    pub hidden_size: usize,
    /// `intermediate_size`.
    pub intermediate_size: usize,
    /// `num_hidden_layers`.
    pub num_hidden_layers: usize,
    /// `num_attention_heads`.
    pub num_attention_heads: usize,
}

/// How queries and keys are rotated.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rotary {
    /// Which two entries turn together.
    pub pairs: Pairs,
    /// The share of each head that turns where `partial_rotary_factor` is absent; `None`: all of it, and the key is refused.
    pub partial: Option<f64>,
    /// Which layer has which rotation.
    pub layers: RotaryLayers,
    /// Whether `llama_4_scaling_beta` among the rotary parameters makes queries grow with their position.
    pub scales_queries: bool,
    /// What stands for no rotary parameters at all, as `rope_scaling` would have it; none where that is the plain rotation.
    pub absent: Option<&'static str>,
}

/// Which two entries of a head turn together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pairs {
    /// The first of the first half with the first of the second, and so on.
    Halves,
    /// The first with the second, the third with the fourth, and so on.
    Neighbours,
}

/// Which layer has which rotation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RotaryLayers {
    /// One for all.
    All,
    /// One for layers that see everything, and one with this base for layers that see a window.
    ByWindow {
        /// The base for layers with a window, where nothing else gives one.
        theta: f64,
        /// The key that gives it, if there is one beside the rotary parameters.
        key: Option<&'static str>,
    },
    /// One, for the layers with a 1 in `no_rope_layers`; absent, for all but every n-th, with n the key `no_rope_layer_interval`.
    Marked {
        /// n, where its key is absent.
        interval: usize,
    },
}

/// A bound on values, `cap * tanh(x / cap)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Softcap {
    /// What is bounded.
    pub place: SoftcapPlace,
    /// The key of the bound; null is none.
    pub key: &'static str,
    /// The bound where the key is absent.
    pub default: Option<f64>,
}

/// What a [`Softcap`] bounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SoftcapPlace {
    /// Attention's scores, before the mask.
    Scores,
    /// Logits.
    Logits,
}

/// A mixture of experts: each token goes through the few feed-forward layers that its router chooses. All of it is frozen.
#[derive(Debug)]
pub struct Experts {
    /// Path of the router inside the block.
    pub router: &'static str,
    /// llama.cpp's name of the router inside the block.
    pub gguf_router: &'static str,
    /// Path of the experts inside the block; their number follows.
    pub path: &'static str,
    /// Gate, up and down of an expert, with llama.cpp's names of all experts' together inside the block.
    pub projections: [(&'static str, &'static str); 3],
    /// The key of their number, further names of it, and the number where all are absent.
    pub count: (&'static [&'static str], usize),
    /// How many a token goes through, where `num_experts_per_tok` is absent.
    pub per_token: usize,
    /// The key of their width, and the width where it is absent.
    pub width: (&'static str, usize),
    /// Whether the chosen experts' weights sum to 1.
    pub normalised: Normalised,
    /// Whether `decoder_sparse_step` and `mlp_only_layers` leave blocks with a plain feed-forward layer.
    pub has_dense_layers: bool,
}

/// Whether the weights of a token's experts are divided by their sum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Normalised {
    /// Always.
    Yes,
    /// As this key says; absent means no.
    Key(&'static str),
}

/// A linear module of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Projection {
    /// Path inside the block, such as `self_attn.q_proj`.
    pub name: &'static str,
    /// llama.cpp's name inside the block, such as `attn_q`.
    pub gguf_name: &'static str,
    /// What its rows are, in order; more than one where projections are fused.
    pub parts: &'static [Role],
    /// Whether it has a bias.
    pub bias: Bias,
}

/// What rows of a projection compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// Queries of attention.
    Query,
    /// Keys of attention.
    Key,
    /// Values of attention.
    Value,
    /// Attention's output.
    Output,
    /// Gate of the feed-forward layer, to which the activation applies.
    Gate,
    /// What the gate multiplies.
    Up,
    /// The feed-forward layer's output.
    Down,
    /// Logits.
    Head,
}

impl Projection {
    /// The last part of its path, such as `q_proj`.
    pub fn leaf(&self) -> &'static str {
        self.name
            .rsplit_once('.')
            .map_or(self.name, |(_, leaf)| leaf)
    }
}

impl Role {
    /// `(in_features, out_features)` in a model of these sizes.
    pub fn features(self, shape: &ModelShape) -> (usize, usize) {
        let hidden = shape.hidden_size;
        match self {
            Self::Query => (hidden, shape.query_width()),
            Self::Key | Self::Value => (hidden, shape.key_value_width()),
            Self::Output => (shape.query_width(), hidden),
            Self::Gate | Self::Up => (hidden, shape.intermediate_size),
            Self::Down => (shape.intermediate_size, hidden),
            Self::Head => (hidden, shape.vocab_size),
        }
    }
}

/// Whether a projection has a bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bias {
    /// Never.
    No,
    /// Always.
    Yes,
    /// As this key says; absent means [`Defaults::biases`].
    Key(&'static str),
}

/// A norm of a block, over the root mean square.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Norm {
    /// Path inside the block, such as `input_layernorm`.
    pub name: &'static str,
    /// llama.cpp's name inside the block, such as `attn_norm`.
    pub gguf_name: &'static str,
    /// Where it applies.
    pub place: NormPlace,
}

/// Where a norm applies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormPlace {
    /// To attention's input.
    BeforeAttention,
    /// To attention's output, before it is added to the residual.
    AfterAttention,
    /// To the feed-forward layer's input.
    BeforeFeedForward,
    /// To the feed-forward layer's output, before it is added to the residual.
    AfterFeedForward,
    /// To the output of the projection with this role.
    On(Role, Extent),
}

/// What one mean square is taken over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// Each head by itself.
    Head,
    /// The whole projection.
    Whole,
}

/// The non-linearity of the gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x / (1 + e^-x)`.
    Silu,
    /// `x` times the normal distribution function.
    Gelu,
    /// The approximation of [`Self::Gelu`] by tanh.
    GeluTanh,
    /// `max(x, 0)`.
    Relu,
}

impl Activation {
    /// Transformers' names of each, the usual one first.
    const NAMES: [(Self, &[&str]); 4] = [
        (Self::Silu, &["silu", "swish"]),
        (Self::Gelu, &["gelu"]),
        (Self::GeluTanh, &["gelu_pytorch_tanh", "gelu_new"]),
        (Self::Relu, &["relu"]),
    ];

    /// By one of transformers' names.
    pub fn named(name: &str) -> Option<Self> {
        let mut known = Self::NAMES.iter();
        known.find_map(|(activation, names)| names.contains(&name).then_some(*activation))
    }

    /// Transformers' usual name.
    pub fn name(self) -> &'static str {
        let mut known = Self::NAMES.iter();
        known
            .find_map(|(activation, names)| (*activation == self).then(|| names[0]))
            .unwrap_or("")
    }
}

/// Which layers see only the last `sliding_window` tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Windows {
    /// None; the key is not read.
    No,
    /// All, if the key gives a window.
    All,
    /// All, if `use_sliding_window` and the key gives a window.
    AllIfUsed,
    /// Those that `layer_types` calls sliding; without it, and if `use_sliding_window`, those from `max_window_layers` on, which
    /// is this if absent.
    From(usize),
    /// Those that `layer_types` calls sliding; without it all but every n-th, with n this or the first of the keys that is there.
    AllBut(usize, &'static [&'static str]),
    /// Those that `layer_types` calls sliding; without it, and if `use_sliding_window`, those without a rotation.
    Unrotated,
}

/// A factor in the computation, 1 (for attention `head_dim^-1/2`) where a family has none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Multiplier {
    /// On embeddings.
    Embedding,
    /// On queries times keys.
    Attention,
    /// On what a sublayer adds to the residual.
    Residual,
    /// By what logits are divided.
    LogitsDivisor,
}

/// What a [`Multiplier`] follows from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Factor {
    /// This key; 1 where it is absent.
    Key(&'static str),
    /// `x^-1/2` of this key, and of the second where it is absent.
    InverseRoot(&'static str, f64),
    /// `hidden_size^1/2`, rounded as the embedding is.
    RootOfWidth,
}

impl Factor {
    /// The key of config.json, if there is one.
    pub fn key(self) -> Option<&'static str> {
        match self {
            Self::Key(key) | Self::InverseRoot(key, _) => Some(key),
            Self::RootOfWidth => None,
        }
    }
}

/// llama.cpp's side of a family.
#[derive(Debug, Clone, Copy)]
pub struct Gguf {
    /// `general.architecture`.
    pub architecture: &'static str,
    /// Further architectures under which llama.cpp keeps models of this family.
    pub also: &'static [&'static str],
    /// The key below the architecture that, where it is above 0, tells this family from the others of its architecture.
    pub told_by: Option<&'static str>,
    /// Whether the two halves of each query and key head are interleaved, row by row.
    pub interleaved: bool,
    /// `attention.sliding_window` where it is absent.
    pub window: Option<usize>,
    /// `rope.freq_base_swa` where it is absent; none is `rope.freq_base`.
    pub local_theta: Option<f64>,
    /// The number of layers of the one size whose scores are scaled by the width over the heads in place of the head's size, which no
    /// key says.
    pub wide_scores: Option<usize>,
    /// Keys below the architecture that change the computation in this family alone, each with the one value that is understood.
    pub switches: &'static [(&'static str, f64)],
    /// In a SentencePiece vocabulary: the special tokens after which white space is kept, where it is dropped after all others.
    pub keeps_space_after: Option<&'static [&'static str]>,
}

impl Gguf {
    /// Whether llama.cpp keeps models of the family under this architecture.
    pub fn has_name(&self, architecture: &str) -> bool {
        self.architecture == architecture || self.also.contains(&architecture)
    }
}

/// The output head.
pub(crate) const HEAD: Projection = Projection {
    name: "lm_head",
    gguf_name: "output",
    parts: &[Role::Head],
    bias: Bias::No,
};

/// The seven projections of a block that keeps each by itself.
pub(super) const fn separate(qkv: Bias, output: Bias, feed_forward: Bias) -> [Projection; 7] {
    const fn one(
        name: &'static str,
        gguf_name: &'static str,
        parts: &'static [Role],
        bias: Bias,
    ) -> Projection {
        Projection {
            name,
            gguf_name,
            parts,
            bias,
        }
    }
    [
        one("self_attn.q_proj", "attn_q", &[Role::Query], qkv),
        one("self_attn.k_proj", "attn_k", &[Role::Key], qkv),
        one("self_attn.v_proj", "attn_v", &[Role::Value], qkv),
        one("self_attn.o_proj", "attn_output", &[Role::Output], output),
        one("mlp.gate_proj", "ffn_gate", &[Role::Gate], feed_forward),
        one("mlp.up_proj", "ffn_up", &[Role::Up], feed_forward),
        one("mlp.down_proj", "ffn_down", &[Role::Down], feed_forward),
    ]
}

impl Norm {
    /// Llama's before attention.
    pub(super) const BEFORE_ATTENTION: Self = Self {
        name: "input_layernorm",
        gguf_name: "attn_norm",
        place: NormPlace::BeforeAttention,
    };
    /// Llama's before the feed-forward layer, whose name says where it stands.
    pub(super) const BEFORE_FEED_FORWARD: Self = Self {
        name: "post_attention_layernorm",
        gguf_name: "ffn_norm",
        place: NormPlace::BeforeFeedForward,
    };
}

impl Family {
    /// What most families are; each file says how its own differs.
    pub(super) const PLAIN: Self = Self {
        model_type: "",
        class_name: "",
        defaults: Defaults {
            num_key_value_heads: None,
            head_dim: None,
            max_position_embeddings: 2048,
            rms_norm_eps: 1e-6,
            rope_theta: 10_000.0,
            tie_word_embeddings: false,
            sliding_window: None,
            activation: Activation::Silu,
            biases: false,
            original_max_position_embeddings: None,
            sizes: None,
        },
        projections: &separate(Bias::No, Bias::No, Bias::No),
        norms: &[Norm::BEFORE_ATTENTION, Norm::BEFORE_FEED_FORWARD],
        norm_offset: 0.0,
        activation_key: "hidden_act",
        windows: Windows::No,
        rotary: Rotary {
            pairs: Pairs::Halves,
            partial: None,
            layers: RotaryLayers::All,
            scales_queries: false,
            absent: None,
        },
        multipliers: &[],
        softcaps: &[],
        experts: None,
        gguf: Gguf {
            architecture: "",
            also: &[],
            told_by: None,
            interleaved: false,
            window: None,
            local_theta: None,
            wide_scores: None,
            switches: &[],
            keeps_space_after: None,
        },
        runtime_keys: None,
    };

    /// The family whose `model_type` this is.
    pub fn named(model_type: &str) -> Option<&'static Self> {
        let mut known = super::FAMILIES.iter().copied();
        known.find(|family| family.model_type == model_type)
    }

    /// The families that llama.cpp keeps under this name, the preferred one first.
    pub fn of_gguf(architecture: &str) -> impl Iterator<Item = &'static Self> {
        let known = super::FAMILIES.iter().copied();
        known.filter(move |family| family.gguf.has_name(architecture))
    }

    /// The projection with this path in a block, or this name in llama.cpp's.
    pub fn projection(&self, name: &str) -> Option<&'static Projection> {
        let mut known = self.projections.iter();
        known.find(|projection| projection.name == name || projection.gguf_name == name)
    }

    /// The keys that say whether there are biases.
    pub fn bias_keys(&self) -> Vec<&'static str> {
        let mut keys = Vec::new();
        for projection in self.projections {
            if let Bias::Key(key) = projection.bias
                && !keys.contains(&key)
            {
                keys.push(key);
            }
        }
        keys
    }

    /// Whether the module or tensor of this name is the router or an expert of the mixture, which carries no adapter here.
    pub fn is_in_mixture(&self, name: &str) -> bool {
        let inner = layer_of(name).map(|(_, _, inner)| inner);
        let experts = inner.zip(self.experts);
        experts.is_some_and(|(inner, experts)| {
            inner == experts.router || inner.starts_with(&format!("{}.", experts.path))
        })
    }

    /// Whether the server's runtime reads `key` of this family's configuration.
    pub fn runtime_reads(&self, key: &str) -> bool {
        self.runtime_keys.is_some_and(|keys| keys.contains(&key))
    }
}

impl PartialEq for Family {
    fn eq(&self, other: &Self) -> bool {
        self.model_type == other.model_type
    }
}
