//! One block of the decoder: sublayers that add to the residual stream, composed as the architecture defines.

use candle_core::Tensor;

use super::adapter::AdapterGradients;
use super::generate::LayerCache;
use super::parts::attention::Attention;
use super::parts::feed_forward::FeedForwardPart;
use super::parts::norm::Norm;
use super::parts::projections::Projection;
use super::parts::{Part, Pass};
use monteclora_adapters::{Precision, Result};

/// A block: attention, then the feed-forward layer.
#[derive(Debug)]
pub(crate) struct Block {
    pub(crate) attention: Sublayer<Attention>,
    pub(crate) feed_forward: Sublayer<FeedForwardPart>,
}

/// `x + scale * after(part(before(x)))`. Each of the norms `before` and `after` may be missing.
#[derive(Debug)]
pub(crate) struct Sublayer<P> {
    pub(crate) before: Option<Norm>,
    pub(crate) part: P,
    pub(crate) after: Option<Norm>,
    pub(crate) scale: f64,
}

/// Activations of a block that the backward pass reads. The others are cheap and recomputed.
#[derive(Debug)]
pub(crate) struct Kept {
    attention: KeptSublayer<Attention>,
    middle: Tensor,
    feed_forward: KeptSublayer<FeedForwardPart>,
}

#[derive(Debug)]
struct KeptSublayer<P: Part> {
    part: P::Kept,
    /// The part's output, if a norm follows.
    output: Option<Tensor>,
}

impl<P: Part> Sublayer<P> {
    fn input(&self, x: &Tensor) -> Result<Tensor> {
        match &self.before {
            Some(norm) => norm.forward(x),
            None => Ok(x.clone()),
        }
    }

    fn forward(
        &self,
        x: &Tensor,
        pass: &Pass<'_>,
        cache: Option<&mut LayerCache>,
    ) -> Result<(Tensor, KeptSublayer<P>)> {
        let input = self.input(x)?;
        // Without a norm and a scale after the part, the part itself adds its output to the residual.
        let is_direct = self.after.is_none() && self.scale == 1.0;
        let residual = is_direct.then_some(x);
        let (y, part) = self.part.forward(&input, pass, residual, cache)?;
        if is_direct {
            return Ok((y, KeptSublayer { part, output: None }));
        }
        let (added, output) = match &self.after {
            None => (y, None),
            Some(norm) => (norm.forward(&y)?, Some(y)),
        };
        Ok(((x + self.scaled(added)?)?, KeptSublayer { part, output }))
    }

    fn scaled(&self, x: Tensor) -> Result<Tensor> {
        match self.scale == 1.0 {
            true => Ok(x),
            false => Ok((x * self.scale)?),
        }
    }

    /// Adds the gradients of this sublayer's updates at `x` to `gradients`, and returns the gradient of `x` if
    /// `wanted`.
    fn backward(
        &self,
        x: &Tensor,
        kept: &KeptSublayer<P>,
        upstream: &Tensor,
        pass: &Pass<'_>,
        gradients: &mut AdapterGradients,
        wanted: bool,
    ) -> Result<Option<Tensor>> {
        let of_added = self.scaled(upstream.clone())?;
        let through_norm = match (&self.after, &kept.output) {
            (Some(norm), Some(y)) => norm.backward(y, &of_added, None)?,
            _ => of_added,
        };
        let input = || self.input(x);
        let part = &self.part;
        let grad = part.backward(&input, &kept.part, through_norm, pass, gradients, wanted)?;
        grad.map(|grad| match &self.before {
            Some(norm) => norm.backward(x, &grad, Some(upstream)),
            None => Ok((upstream + grad)?),
        })
        .transpose()
    }
}

impl Block {
    /// The block's linear modules that can carry an update.
    pub(crate) fn projections(&self) -> impl Iterator<Item = &Projection> {
        let attention = &self.attention.part;
        let gated = match &self.feed_forward.part {
            FeedForwardPart::Gated(layer) => Some([&layer.inner, &layer.down]),
            FeedForwardPart::Experts(_) => None,
        };
        let lists = [&attention.inner, &attention.output].into_iter();
        let lists = lists.chain(gated.into_iter().flatten());
        lists.flat_map(|projections| &projections.0)
    }

    /// The block's linear modules that can carry an update.
    pub(crate) fn projections_mut(&mut self) -> impl Iterator<Item = &mut Projection> {
        let attention = &mut self.attention.part;
        let gated = match &mut self.feed_forward.part {
            FeedForwardPart::Gated(layer) => Some([&mut layer.inner, &mut layer.down]),
            FeedForwardPart::Experts(_) => None,
        };
        let lists = [&mut attention.inner, &mut attention.output].into_iter();
        let lists = lists.chain(gated.into_iter().flatten());
        lists.flat_map(|projections| &mut projections.0)
    }

    /// Computes products with the block's frozen weights in `precision`.
    pub(crate) fn set_precision(&mut self, precision: Precision) {
        for projection in self.projections_mut() {
            projection.linear.set_precision(precision);
        }
        if let FeedForwardPart::Experts(experts) = &mut self.feed_forward.part {
            experts.set_precision(precision);
        }
    }

    /// Computes the block at `x` `[tokens, hidden]`. With a cache, attention also reads keys and values of earlier
    /// tokens.
    pub(crate) fn forward(
        &self,
        x: &Tensor,
        pass: &Pass<'_>,
        cache: Option<&mut LayerCache>,
    ) -> Result<(Tensor, Kept)> {
        let (middle, attention) = self.attention.forward(x, pass, cache)?;
        let (y, feed_forward) = self.feed_forward.forward(&middle, pass, None)?;
        let kept = Kept {
            attention,
            middle,
            feed_forward,
        };
        Ok((y, kept))
    }

    /// Computes the block at `x` `[tokens, hidden]`. Returns all rows, or those of `wanted` in its order: the feed-forward
    /// layer computes no others. Nothing is kept for a backward pass.
    pub(crate) fn forward_at(
        &self,
        x: &Tensor,
        pass: &Pass<'_>,
        wanted: Option<&Tensor>,
    ) -> Result<Tensor> {
        let (mut middle, _) = self.attention.forward(x, pass, None)?;
        if let Some(rows) = wanted {
            middle = middle.index_select(rows, 0)?;
        }
        Ok(self.feed_forward.forward(&middle, pass, None)?.0)
    }

    /// Adds the gradients of this block's updates to `gradients`, and returns the gradient of `x` if `wanted`.
    pub(crate) fn backward(
        &self,
        x: &Tensor,
        kept: &Kept,
        upstream: &Tensor,
        pass: &Pass<'_>,
        gradients: &mut AdapterGradients,
        wanted: bool,
    ) -> Result<Option<Tensor>> {
        let Kept {
            attention,
            middle,
            feed_forward,
        } = kept;
        let sublayer = &self.feed_forward;
        let grad = sublayer.backward(middle, feed_forward, upstream, pass, gradients, true)?;
        match grad {
            Some(grad) => self
                .attention
                .backward(x, attention, &grad, pass, gradients, wanted),
            None => Ok(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use candle_core::Device;
    use monteclora_adapters::{FrozenLinear, LowRank};
    use monteclora_converters::architecture::Activation;

    use super::*;
    use crate::model::adapter::{ActiveAdapter, ModuleId};
    use crate::model::dropout::Dropout;
    use crate::model::parts::activation::Gate;
    use crate::model::parts::attention::{Heads, Masks, Segment};
    use crate::model::parts::feed_forward::FeedForward;
    use crate::model::parts::gradient_tests::{check, dot};
    use crate::model::parts::projections::Projections;
    use crate::model::parts::rotary::Rotation;
    use crate::model::parts::testing::{devices, largest_difference, matrix, matrix_on};

    const HIDDEN: usize = 12;
    const INNER: usize = 10;
    const HEADS: Heads = Heads {
        query: 4,
        key_value: 2,
        dim: 6,
        window: Some(4),
        scale: None,
        softcap: None,
    };
    /// Outputs of queries, keys, values, attention, gate, up and down.
    const WIDTHS: [usize; 7] = [24, 12, 12, HIDDEN, INNER, INNER, HIDDEN];

    fn norm(width: usize, seed: f64, device: &Device) -> Result<Norm> {
        let weight = (matrix_on(device, 1, width, seed).flatten_all()? + 1.5)?;
        // With so large an epsilon, norms after small outputs curve slowly enough for the finite differences.
        Ok(Norm { weight, eps: 1.0 })
    }

    fn weight(role: usize, device: &Device) -> Tensor {
        let inputs = match role {
            3 => WIDTHS[0],
            6 => INNER,
            _ => HIDDEN,
        };
        (matrix_on(device, WIDTHS[role], inputs, role as f64) * 0.1).expect("a product")
    }

    /// Modules of `roles`, one per role or fused into one.
    fn projections(
        roles: std::ops::Range<usize>,
        fused: bool,
        device: &Device,
    ) -> Result<Projections> {
        let groups: Vec<Vec<usize>> = match fused {
            true => vec![roles.collect()],
            false => roles.map(|role| vec![role]).collect(),
        };
        let group = |roles: &Vec<usize>| -> Result<Projection> {
            let weights: Vec<Tensor> = roles.iter().map(|role| weight(*role, device)).collect();
            Ok(Projection {
                id: ModuleId(roles[0]),
                name: format!("module {}", roles[0]),
                linear: FrozenLinear::new(Arc::new(Tensor::cat(&weights, 0)?), None)?,
                parts: roles.iter().map(|role| WIDTHS[*role]).collect(),
            })
        };
        let list: Result<_> = groups.iter().map(group).collect();
        Ok(Projections(list?))
    }

    /// A block with optional norms before and after both sublayers. With `after`, also norms on queries and keys.
    fn block(
        before: bool,
        after: bool,
        fused: bool,
        rope: Option<usize>,
        device: &Device,
    ) -> Result<Block> {
        let place = |there: bool, seed| there.then(|| norm(HIDDEN, seed, device)).transpose();
        Ok(Block {
            attention: Sublayer {
                before: place(before, 0.1)?,
                part: Attention {
                    inner: projections(0..3, fused, device)?,
                    output: projections(3..4, false, device)?,
                    norms: match after {
                        true => [Some(norm(24, 0.5, device)?), Some(norm(6, 0.6, device)?)],
                        false => [None, None],
                    },
                    heads: HEADS,
                    rope,
                },
                after: place(after, 0.2)?,
                scale: 1.0,
            },
            feed_forward: Sublayer {
                before: place(before, 0.3)?,
                part: FeedForwardPart::Gated(FeedForward {
                    inner: projections(4..6, fused, device)?,
                    down: projections(6..7, false, device)?,
                    gate: Gate::of(Activation::Silu).expect("computed"),
                }),
                after: place(after, 0.4)?,
                scale: if fused { 0.7 } else { 1.0 },
            },
        })
    }

    fn updates(block: &Block, device: &Device) -> Result<Vec<(ModuleId, LowRank)>> {
        block
            .projections()
            .map(|projection| {
                let (outputs, inputs) = projection.linear.weight().dims()?;
                let seed = projection.id.0 as f64;
                let low_rank = LowRank {
                    a: (matrix_on(device, 2, inputs, seed + 0.3) * 0.1)?,
                    b: (matrix_on(device, outputs, 2, seed + 0.7) * 0.1)?,
                    scaling: 0.8,
                };
                Ok((projection.id, low_rank))
            })
            .collect()
    }

    fn segments() -> Vec<Segment> {
        let segment = |start, len| Segment {
            query_start: start,
            query_len: len,
            key_start: start,
            key_len: len,
        };
        vec![segment(0, 7), segment(7, 4)]
    }

    fn rotations(device: &Device) -> Result<Vec<Rotation>> {
        let positions = [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3];
        Ok(vec![Rotation::plain(&positions, &[1.0, 0.3, 0.1], device)?])
    }

    /// The gradients of the input and of every factor are right for several compositions that an architecture can
    /// define.
    #[test]
    fn gradients_are_finite_differences() -> Result<()> {
        let dropout = Dropout {
            probability: 0.3,
            seed: 5,
            step: 2,
            rows: vec![4, 9],
        };
        for (before, after, fused, rope, dropout) in [
            (true, false, false, Some(0), None),
            (false, true, true, None, Some(&dropout)),
            (true, true, true, Some(0), None),
            (false, false, false, None, Some(&dropout)),
        ] {
            for device in devices() {
                let block = block(before, after, fused, rope, device)?;
                gradients_of(&block, dropout, device)?;
            }
        }
        Ok(())
    }

    fn gradients_of(block: &Block, dropout: Option<&Dropout>, device: &Device) -> Result<()> {
        let (segments, rotations) = (segments(), rotations(device)?);
        let updates = updates(block, device)?;
        let [x, upstream] = [0.9, 0.2].map(|seed| matrix_on(device, 11, HIDDEN, seed));
        let run = |inputs: &[Tensor], gradients: Option<&mut AdapterGradients>| {
            let moved = updates.iter().zip(inputs[1..].chunks_exact(2));
            let adapter = ActiveAdapter::new(moved.map(|((id, update), factors)| {
                let [a, b] = [0, 1].map(|i| factors[i].clone());
                (*id, LowRank { a, b, ..*update })
            }));
            let pass = Pass {
                rotations: &rotations,
                segments: &segments,
                keys: None,
                masks: &Masks::default(),
                adapter: &adapter,
                dropout,
            };
            let (y, kept) = block.forward(&inputs[0], &pass, None)?;
            match gradients {
                Some(sums) => block.backward(&inputs[0], &kept, &upstream, &pass, sums, true),
                None => Ok(Some(y)),
            }
        };
        let mut inputs = vec![x];
        for (_, update) in &updates {
            inputs.extend([update.a.clone(), update.b.clone()]);
        }
        let mut sums = AdapterGradients::default();
        let mut gradients = vec![run(&inputs, Some(&mut sums))?.expect("wanted")];
        for (id, _) in &updates {
            gradients.extend_from_slice(sums.get(*id).expect("has an update"));
        }
        assert_eq!(gradients.len(), inputs.len());
        check(&inputs, &gradients, |inputs| {
            dot(&run(inputs, None)?.expect("an output"), &upstream)
        })
    }

    /// Fused modules compute the same as separate modules with the same rows.
    #[test]
    fn fused_modules_equal_separate_ones() -> Result<()> {
        let (segments, rotations) = (segments(), rotations(&Device::Cpu)?);
        let pass = Pass {
            rotations: &rotations,
            segments: &segments,
            keys: None,
            masks: &Masks::default(),
            adapter: &ActiveAdapter::default(),
            dropout: None,
        };
        let x = matrix(11, HIDDEN, 0.9);
        let [fused, separate] = [true, false].map(|fused| {
            let mut block = block(true, true, fused, Some(0), &Device::Cpu)?;
            block.feed_forward.scale = 1.0;
            Ok::<_, monteclora_adapters::Error>(block.forward(&x, &pass, None)?.0)
        });
        assert!(largest_difference(&fused?, &separate?) < 1e-5);
        Ok(())
    }
}
