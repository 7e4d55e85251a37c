//! Sites of a decoder and the updates that are active at them.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use monteclora_adapters::{LowRank, Update};
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

/// The updates active in a forward pass.
#[derive(Debug, Clone, Default)]
pub struct ActiveAdapter {
    sites: BTreeMap<SiteId, Arc<dyn Update>>,
}

impl ActiveAdapter {
    /// An adapter of the given sites.
    pub fn new<U: Into<Arc<dyn Update>>>(sites: impl IntoIterator<Item = (SiteId, U)>) -> Self {
        Self {
            sites: sites
                .into_iter()
                .map(|(site, update)| (site, update.into()))
                .collect(),
        }
    }

    /// The posterior mean of `adapter` on `device`, after checking that every site exists with its shape.
    pub fn from_adapter(
        adapter: &monteclora_converters::Adapter,
        config: &ModelShape,
        device: &Device,
    ) -> Result<Self> {
        Ok(Self::new(low_rank(adapter, config, device)?))
    }

    /// A posterior draw of the adapter that `mean` comes from: draws differ in A only, and so hold one B between them.
    pub(crate) fn from_draw(
        drawn: &monteclora_converters::Adapter,
        mean: &Self,
        config: &ModelShape,
        device: &Device,
    ) -> Result<Self> {
        let mut sites = low_rank(drawn, config, device)?;
        for (site, low_rank) in &mut sites {
            if let Some([_, b]) = mean.get(*site).map(Update::factors).as_deref() {
                low_rank.b = Tensor::clone(b);
            }
        }
        Ok(Self::new(sites))
    }

    /// The update at `site`.
    pub fn get(&self, site: SiteId) -> Option<&dyn Update> {
        self.sites.get(&site).map(Arc::as_ref)
    }

    /// Sites in order.
    pub fn sites(&self) -> impl Iterator<Item = SiteId> {
        self.sites.keys().copied()
    }
}

/// The low-rank matrices of `adapter` on `device` in the order of the sites, after checking that every site exists with its shape.
pub(crate) fn low_rank(
    adapter: &monteclora_converters::Adapter,
    config: &ModelShape,
    device: &Device,
) -> Result<BTreeMap<SiteId, LowRank>> {
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
        Ok(sites)
    } else {
        Err(Error::Adapter { problems })
    }
}

/// Gradients of the loss with respect to the factors of each site's update.
#[derive(Debug, Clone, Default)]
pub struct AdapterGradients {
    sites: BTreeMap<SiteId, Vec<Tensor>>,
}

impl AdapterGradients {
    /// Adds gradients of the factors at `site`, in the order of [`Update::factors`]; none where there is no update.
    pub(crate) fn add(&mut self, site: SiteId, gradients: Vec<Tensor>) -> Result<()> {
        if !gradients.is_empty() {
            let before = self.sites.remove(&site).unwrap_or_default();
            self.sites.insert(site, sum_of_factors(before, gradients)?);
        }
        Ok(())
    }

    /// Adds all gradients of `other`: another micro-batch of the same step.
    pub fn add_all(&mut self, other: Self) -> Result<()> {
        for (site, gradients) in other.sites {
            self.add(site, gradients)?;
        }
        Ok(())
    }

    /// Gradients of the factors at `site`, in the order of [`Update::factors`].
    pub fn get(&self, site: SiteId) -> Option<&[Tensor]> {
        self.sites.get(&site).map(Vec::as_slice)
    }
}

/// Adds the gradients of one update's factors to those `before`, if there are any.
pub(crate) fn sum_of_factors(before: Vec<Tensor>, more: Vec<Tensor>) -> Result<Vec<Tensor>> {
    if before.is_empty() {
        return Ok(more);
    }
    let sums = before.iter().zip(&more).map(|(sum, more)| sum + more);
    Ok(sums.collect::<candle_core::Result<_>>()?)
}
