//! Sites of a decoder and the low-rank matrices that are active at them.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};
use monteclora_adapters::LowRank;
use monteclora_converters::architecture::ModelShape;

use super::{Error, Result};

/// The projections of a block, in the order of Hugging Face checkpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Projection {
    /// `self_attn.q_proj`
    Query,
    /// `self_attn.k_proj`
    Key,
    /// `self_attn.v_proj`
    Value,
    /// `self_attn.o_proj`
    Output,
    /// `mlp.gate_proj`
    Gate,
    /// `mlp.up_proj`
    Up,
    /// `mlp.down_proj`
    Down,
}

impl Projection {
    /// All seven.
    pub const ALL: [Self; 7] = [
        Self::Query,
        Self::Key,
        Self::Value,
        Self::Output,
        Self::Gate,
        Self::Up,
        Self::Down,
    ];

    /// Module path inside a block.
    pub fn path(self) -> &'static str {
        match self {
            Self::Query => "self_attn.q_proj",
            Self::Key => "self_attn.k_proj",
            Self::Value => "self_attn.v_proj",
            Self::Output => "self_attn.o_proj",
            Self::Gate => "mlp.gate_proj",
            Self::Up => "mlp.up_proj",
            Self::Down => "mlp.down_proj",
        }
    }
}

/// A projection of the decoder that can carry an adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SiteId {
    /// A projection of a block.
    Block(usize, Projection),
    /// The output head.
    Head,
}

impl SiteId {
    /// Module path, e.g. `model.layers.0.self_attn.q_proj` or `lm_head`.
    pub fn name(self) -> String {
        match self {
            Self::Block(layer, projection) => format!("model.layers.{layer}.{}", projection.path()),
            Self::Head => "lm_head".to_owned(),
        }
    }

    /// All sites of a decoder, blocks first.
    pub fn all(config: &ModelShape) -> impl Iterator<Item = Self> + use<> {
        let layers = config.num_hidden_layers;
        (0..layers)
            .flat_map(|layer| Projection::ALL.map(|p| Self::Block(layer, p)))
            .chain(std::iter::once(Self::Head))
    }

    /// `(in_features, out_features)`.
    pub fn shape(self, config: &ModelShape) -> (usize, usize) {
        let hidden = config.hidden_size;
        let queries = config.num_attention_heads * config.head_dim;
        let keys = config.num_key_value_heads * config.head_dim;
        match self {
            Self::Head => (hidden, config.vocab_size),
            Self::Block(_, projection) => match projection {
                Projection::Query => (hidden, queries),
                Projection::Key | Projection::Value => (hidden, keys),
                Projection::Output => (queries, hidden),
                Projection::Gate | Projection::Up => (hidden, config.intermediate_size),
                Projection::Down => (config.intermediate_size, hidden),
            },
        }
    }
}

/// The low-rank matrices active in a forward pass.
#[derive(Debug, Clone, Default)]
pub struct ActiveAdapter {
    sites: BTreeMap<SiteId, LowRank>,
}

impl ActiveAdapter {
    /// An adapter of the given sites.
    pub fn new(sites: impl IntoIterator<Item = (SiteId, LowRank)>) -> Self {
        Self {
            sites: sites.into_iter().collect(),
        }
    }

    /// The posterior mean of `adapter` on `device`, after checking that every site exists with its shape.
    pub fn from_adapter(
        adapter: &monteclora_converters::Adapter,
        config: &ModelShape,
        device: &Device,
    ) -> Result<Self> {
        let known: BTreeMap<String, SiteId> = SiteId::all(config)
            .map(|site| (site.name(), site))
            .collect();
        let mut problems = Vec::new();
        let mut sites = BTreeMap::new();
        for site in &adapter.sites {
            let Some(id) = known.get(&site.name) else {
                problems.push(format!("{}: the base has no such projection", site.name));
                continue;
            };
            let (found, expected) = ((site.in_features(), site.out_features()), id.shape(config));
            if found != expected {
                problems.push(format!(
                    "{}: the adapter is for {} -> {}, the base has {} -> {}",
                    site.name, found.0, found.1, expected.0, expected.1
                ));
                continue;
            }
            let tensor = |values: &monteclora_converters::Tensor| -> Result<Tensor> {
                let cpu = Tensor::from_vec(values.to_f32()?, values.shape(), &Device::Cpu)?;
                Ok(cpu.to_device(device)?)
            };
            let low_rank = LowRank {
                a: tensor(&site.lora_a)?,
                b: tensor(&site.lora_b)?,
                scaling: site.scaling,
            };
            sites.insert(*id, low_rank);
        }
        if problems.is_empty() {
            Ok(Self { sites })
        } else {
            Err(Error::Adapter { problems })
        }
    }

    /// The same adapter with the B of `other`: draws of one posterior differ in A only, and so hold one B between them.
    pub(crate) fn sharing_b(mut self, other: &Self) -> Self {
        for (site, low_rank) in &mut self.sites {
            if let Some(shared) = other.sites.get(site) {
                low_rank.b = shared.b.clone();
            }
        }
        self
    }

    /// The matrices at `site`.
    pub fn get(&self, site: SiteId) -> Option<&LowRank> {
        self.sites.get(&site)
    }

    /// Sites with their matrices, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&SiteId, &LowRank)> {
        self.sites.iter()
    }
}

/// Gradients of the loss with respect to the active A and B of each site.
#[derive(Debug, Clone, Default)]
pub struct AdapterGradients {
    sites: BTreeMap<SiteId, (Tensor, Tensor)>,
}

impl AdapterGradients {
    /// Adds gradients of A `[r, in]` and B `[out, r]` at `site`.
    pub(crate) fn add(&mut self, site: SiteId, gradients: Option<(Tensor, Tensor)>) -> Result<()> {
        if let Some((a, b)) = gradients {
            let sum = match self.sites.remove(&site) {
                None => (a, b),
                Some((sum_a, sum_b)) => ((sum_a + a)?, (sum_b + b)?),
            };
            self.sites.insert(site, sum);
        }
        Ok(())
    }

    /// Adds all gradients of `other`: another micro-batch of the same step.
    pub fn add_all(&mut self, other: Self) -> Result<()> {
        for (site, gradients) in other.sites {
            self.add(site, Some(gradients))?;
        }
        Ok(())
    }

    /// Gradients with respect to A and B at `site`.
    pub fn get(&self, site: SiteId) -> Option<&(Tensor, Tensor)> {
        self.sites.get(&site)
    }
}
