//! The types that describe a decoder family.

use super::ModelShape;
use crate::module_path::layer_of;

/// A decoder family: everything about its models except the numbers of a single model.
#[derive(Debug)]
pub struct Family {
    /// `model_type` of config.json.
    pub model_type: &'static str,
    /// The class of transformers, as `architectures` of config.json names it.
    pub class_name: &'static str,
    /// The values of absent keys.
    pub defaults: Defaults,
    /// The linear modules of a block, in the order of checkpoints; fused modules keep their name.
    pub projections: &'static [Projection],
    /// The norms of a block.
    pub norms: &'static [Norm],
    /// Offset added to the weight of every norm, including the last: 1 if a weight of 0 means a scale of 1.
    pub norm_offset: f32,
    /// The key that names the activation.
    pub activation_key: &'static str,
    /// Which layers attend only to a sliding window.
    pub windows: Windows,
    /// How queries and keys are rotated.
    pub rotary: Rotary,
    /// Factors in the computation, and where each comes from.
    pub multipliers: &'static [(Multiplier, Factor)],
    /// Bounds on attention scores and on logits.
    pub softcaps: &'static [Softcap],
    /// The mixture of experts that replaces the feed-forward layer in some or all blocks.
    pub experts: Option<&'static Experts>,
    /// How llama.cpp represents the family.
    pub gguf: Gguf,
    /// Keys of this family's configuration that the server's runtime reads, besides the sizes that all families have. A
    /// model that another key changes cannot be served. `None` if the runtime does not support the family.
    pub runtime_keys: Option<&'static [&'static str]>,
}

/// The values that transformers assumes for keys that are absent from config.json.
#[derive(Debug, Clone, Copy)]
pub struct Defaults {
    /// `num_key_value_heads`. `None` means the number of query heads, as a null always does.
    pub num_key_value_heads: Option<usize>,
    /// `head_dim`. `None` means the width divided by the number of heads, as a null always does.
    pub head_dim: Option<usize>,
    /// `max_position_embeddings`.
    pub max_position_embeddings: usize,
    /// `rms_norm_eps`.
    pub rms_norm_eps: f64,
    /// `rope_theta`.
    pub rope_theta: f64,
    /// `tie_word_embeddings`.
    pub tie_word_embeddings: bool,
    /// `sliding_window`. A null always means no window.
    pub sliding_window: Option<usize>,
    /// The activation.
    pub activation: Activation,
    /// Whether biases exist if their key is absent; see [`Bias::Key`].
    pub biases: bool,
    /// `original_max_position_embeddings` beside the rotary parameters, if the class has this key. It then takes
    /// precedence.
    pub original_max_position_embeddings: Option<usize>,
    /// Default sizes of the class, if published configurations omit sizes.
    pub sizes: Option<Sizes>,
}

/// Default sizes of a configuration class of transformers.
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
    /// Which two entries are rotated together.
    pub pairs: Pairs,
    /// The share of each head that is rotated if `partial_rotary_factor` is absent. `None`: the whole head, and the key
    /// is refused.
    pub partial: Option<f64>,
    /// Which layer has which rotation.
    pub layers: RotaryLayers,
    /// Whether `llama_4_scaling_beta` among the rotary parameters scales queries with their position.
    pub scales_queries: bool,
    /// The rotary parameters if config.json has none, in the form of `rope_scaling`. `None` means the plain rotation.
    pub absent: Option<&'static str>,
}

/// Which two entries of a head are rotated together.
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
    /// One rotation for all layers.
    All,
    /// One rotation for layers with full attention, and one with this base for layers with a sliding window.
    ByWindow {
        /// The default base for layers with a sliding window.
        theta: f64,
        /// The key of this base, if there is one beside the rotary parameters.
        key: Option<&'static str>,
    },
    /// One rotation for the layers with a 1 in `no_rope_layers`. If that key is absent, for all layers but every n-th,
    /// where n is the key `no_rope_layer_interval`.
    Marked {
        /// n, if its key is absent.
        interval: usize,
    },
}

/// A bound on values, `cap * tanh(x / cap)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Softcap {
    /// What is bounded.
    pub place: SoftcapPlace,
    /// The key of the bound; a null means no bound.
    pub key: &'static str,
    /// The bound if the key is absent.
    pub default: Option<f64>,
}

/// What a [`Softcap`] bounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SoftcapPlace {
    /// Attention scores, before the mask.
    Scores,
    /// Logits.
    Logits,
}

/// A mixture of experts: its router sends each token through a few of the feed-forward layers. All of it is frozen.
#[derive(Debug)]
pub struct Experts {
    /// Path of the router inside the block.
    pub router: &'static str,
    /// llama.cpp's name of the router inside the block.
    pub gguf_router: &'static str,
    /// Path of the experts inside the block; the number of the expert follows.
    pub path: &'static str,
    /// Names of an expert's gate, up and down, each with llama.cpp's name inside the block for the tensor of all
    /// experts.
    pub projections: [(&'static str, &'static str); 3],
    /// The keys of the number of experts, and the number if all are absent.
    pub count: (&'static [&'static str], usize),
    /// Experts per token, if `num_experts_per_tok` is absent.
    pub per_token: usize,
    /// The key of the width of an expert, and the width if it is absent.
    pub width: (&'static str, usize),
    /// Whether the chosen experts' weights sum to 1.
    pub normalised: Normalised,
    /// Whether `decoder_sparse_step` and `mlp_only_layers` give some blocks a plain feed-forward layer.
    pub has_dense_layers: bool,
}

/// Whether the weights of a token's experts are divided by their sum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Normalised {
    /// Always.
    Yes,
    /// If this key is true; absent means no.
    Key(&'static str),
}

/// A linear module of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Projection {
    /// Path inside the block, such as `self_attn.q_proj`.
    pub name: &'static str,
    /// llama.cpp's name inside the block, such as `attn_q`.
    pub gguf_name: &'static str,
    /// What its rows compute, in order; several roles if projections are fused.
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
    /// The factor that the gate multiplies.
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
    /// If this key is true; absent means [`Defaults::biases`].
    Key(&'static str),
}

/// A root-mean-square norm of a block.
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

/// The values over which a norm takes one mean square.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// Each head separately.
    Head,
    /// The whole projection.
    Whole,
}

/// The activation function of the gate.
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
    /// transformers' names of each activation, the usual one first.
    const NAMES: [(Self, &[&str]); 4] = [
        (Self::Silu, &["silu", "swish"]),
        (Self::Gelu, &["gelu"]),
        (Self::GeluTanh, &["gelu_pytorch_tanh", "gelu_new"]),
        (Self::Relu, &["relu"]),
    ];

    /// Finds an activation by one of transformers' names.
    pub fn named(name: &str) -> Option<Self> {
        let mut known = Self::NAMES.iter();
        known.find_map(|(activation, names)| names.contains(&name).then_some(*activation))
    }

    /// transformers' usual name.
    pub fn name(self) -> &'static str {
        let mut known = Self::NAMES.iter();
        known
            .find_map(|(activation, names)| (*activation == self).then(|| names[0]))
            .unwrap_or("")
    }
}

/// Which layers attend only to the last `sliding_window` tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Windows {
    /// None; the key is not read.
    No,
    /// All, if the key gives a window.
    All,
    /// All, if `use_sliding_window` and the key gives a window.
    AllIfUsed,
    /// Those that `layer_types` calls sliding. Without that key, and if `use_sliding_window`, those from
    /// `max_window_layers` on, which is this number if absent.
    From(usize),
    /// Those that `layer_types` calls sliding. Without that key all but every n-th, where n is the first of these keys
    /// that is present, or else this number.
    AllBut(usize, &'static [&'static str]),
    /// Those that `layer_types` calls sliding. Without that key, and if `use_sliding_window`, those without a rotation.
    Unrotated,
}

/// A factor in the computation. It is 1 (for attention `head_dim^-1/2`) if a family does not set it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Multiplier {
    /// On embeddings.
    Embedding,
    /// On the products of queries and keys.
    Attention,
    /// On what a sublayer adds to the residual.
    Residual,
    /// The divisor of logits.
    LogitsDivisor,
}

/// Where the value of a [`Multiplier`] comes from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Factor {
    /// The value of this key; 1 if it is absent.
    Key(&'static str),
    /// `x^-1/2`, where x is the value of this key, or this number if the key is absent.
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

/// How llama.cpp represents a family.
#[derive(Debug, Clone, Copy)]
pub struct Gguf {
    /// `general.architecture`.
    pub architecture: &'static str,
    /// Other architectures under which llama.cpp stores models of this family.
    pub also: &'static [&'static str],
    /// A key below the architecture. A value above 0 distinguishes this family from others of the same architecture.
    pub told_by: Option<&'static str>,
    /// Whether the two halves of each query and key head are interleaved, row by row.
    pub interleaved: bool,
    /// `attention.sliding_window` if it is absent.
    pub window: Option<usize>,
    /// `rope.freq_base_swa` if it is absent; `None` means the value of `rope.freq_base`.
    pub local_theta: Option<f64>,
    /// Number of layers of the one model size that scales scores by the width divided by the number of heads, not by
    /// the head size. No key of the file records this.
    pub wide_scores: Option<usize>,
    /// Keys below the architecture that change the computation in this family only, each with the only value that is
    /// supported.
    pub switches: &'static [(&'static str, f64)],
    /// For a SentencePiece vocabulary: the special tokens after which white space is kept; after all others it is
    /// dropped.
    pub keeps_space_after: Option<&'static [&'static str]>,
}

impl Gguf {
    /// Whether llama.cpp stores models of the family under this architecture.
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

/// The seven projections of a block without fused modules.
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
    /// Llama's norm before attention.
    pub(super) const BEFORE_ATTENTION: Self = Self {
        name: "input_layernorm",
        gguf_name: "attn_norm",
        place: NormPlace::BeforeAttention,
    };
    /// Llama's norm before the feed-forward layer. Its name refers to its position after attention.
    pub(super) const BEFORE_FEED_FORWARD: Self = Self {
        name: "post_attention_layernorm",
        gguf_name: "ffn_norm",
        place: NormPlace::BeforeFeedForward,
    };
}

impl Family {
    /// The defaults of most families; each family's file states its differences.
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

    /// Finds the family with this `model_type`.
    pub fn named(model_type: &str) -> Option<&'static Self> {
        let mut known = super::FAMILIES.iter().copied();
        known.find(|family| family.model_type == model_type)
    }

    /// Returns the families that llama.cpp stores under this name, the preferred one first.
    pub fn of_gguf(architecture: &str) -> impl Iterator<Item = &'static Self> {
        let known = super::FAMILIES.iter().copied();
        known.filter(move |family| family.gguf.has_name(architecture))
    }

    /// Finds the projection with this path in a block or this llama.cpp name.
    pub fn projection(&self, name: &str) -> Option<&'static Projection> {
        let mut known = self.projections.iter();
        known.find(|projection| projection.name == name || projection.gguf_name == name)
    }

    /// The keys that set whether projections have biases.
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

    /// Whether `name` is the module or a tensor of the router or of an expert. These carry no adapter.
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
