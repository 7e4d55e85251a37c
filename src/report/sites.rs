//! Draws one value per site as a grid of blocks and projections.

use std::collections::BTreeSet;
use std::fmt::Write;

use monteclora_converters::SiteSummary;
use monteclora_converters::architecture::FAMILIES;

use super::chart::number;

/// Width of the drawing, and of the column of block numbers.
const WIDTH: f64 = 480.0;
const LEFT: f64 = 34.0;
const TOP: f64 = 18.0;

/// The value that the grid shows per site: the posterior's spread, or the size of the update if there is no posterior.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shown {
    /// Standard deviation of the noise on A over the root mean square of A.
    NoiseToSignal,
    /// Norm of the update.
    Delta,
}

impl Shown {
    /// The noise if every site has it, otherwise the update.
    pub(super) fn of(sites: &[SiteSummary]) -> Self {
        if sites.iter().all(|site| site.noise_to_signal.is_some()) {
            Self::NoiseToSignal
        } else {
            Self::Delta
        }
    }

    /// The value at a site.
    pub(super) fn value(self, site: &SiteSummary) -> f64 {
        match self {
            Self::NoiseToSignal => site.noise_to_signal.unwrap_or(f64::NAN),
            Self::Delta => site.norm_delta,
        }
    }
}

/// Block number and projection of a module path such as `model.layers.3.self_attn.q_proj`.
fn place(name: &str) -> Option<(usize, &str)> {
    let (path, leaf) = name.rsplit_once('.')?;
    let block = path.split('.').find_map(|part| part.parse().ok())?;
    Some((block, leaf))
}

/// Position of a projection in the order of the known families' blocks. Unknown projections come last.
fn order(leaf: &str) -> usize {
    let known = FAMILIES.iter().flat_map(|family| family.projections);
    known
        .take_while(|projection| projection.leaf() != leaf)
        .count()
}

/// The grid as SVG. Sites outside the blocks are only in the table. Empty if no site is in a block.
pub(super) fn grid(sites: &[SiteSummary], shown: Shown) -> String {
    let mut leaves: Vec<&str> = Vec::new();
    let mut blocks = BTreeSet::new();
    for (block, leaf) in sites.iter().filter_map(|site| place(&site.name)) {
        blocks.insert(block);
        if !leaves.contains(&leaf) {
            leaves.push(leaf);
        }
    }
    if blocks.is_empty() {
        return String::new();
    }
    leaves.sort_by_key(|leaf| order(leaf));
    let finite = sites
        .iter()
        .map(|site| shown.value(site))
        .filter(|v| v.is_finite());
    let (low, high) = finite.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| {
        (low.min(v), high.max(v))
    });
    let blocks: Vec<usize> = blocks.into_iter().collect();
    let height = (420.0 / blocks.len() as f64).clamp(6.0, 18.0);
    let width = (WIDTH - LEFT) / leaves.len() as f64;
    let total = TOP + height * blocks.len() as f64 + 2.0;
    // Writing to a string cannot fail.
    let mut svg = format!(
        r#"<svg class="grid" viewBox="0 0 {WIDTH} {total:.0}" role="img" aria-label="one value a site">"#
    );
    for (column, leaf) in leaves.iter().enumerate() {
        let x = LEFT + width * (column as f64 + 0.5);
        let short = leaf.strip_suffix("_proj").unwrap_or(leaf);
        let _ = write!(
            svg,
            r#"<text class="tick" x="{x:.1}" y="12" text-anchor="middle">"#
        );
        svg.push_str(&escaped(short));
        svg.push_str("</text>");
    }
    let labelled = (14.0 / height).ceil().max(1.0) as usize;
    for (row, block) in blocks.iter().enumerate().step_by(labelled) {
        let y = TOP + height * (row as f64 + 0.5) + 4.0;
        let _ = write!(
            svg,
            r#"<text class="tick" x="{}" y="{y:.1}" text-anchor="end">{block}</text>"#,
            LEFT - 6.0
        );
    }
    for site in sites {
        let Some((block, leaf)) = place(&site.name) else {
            continue;
        };
        let (Some(row), Some(column)) = (
            blocks.iter().position(|b| *b == block),
            leaves.iter().position(|l| *l == leaf),
        ) else {
            continue;
        };
        let value = shown.value(site);
        let share = if high > low {
            (value - low) / (high - low)
        } else {
            0.5
        };
        let opacity = if share.is_finite() {
            0.1 + 0.9 * share
        } else {
            0.0
        };
        let _ = write!(
            svg,
            r#"<rect class="cell" x="{:.1}" y="{:.1}" width="{:.1}" height="{:.1}" fill-opacity="{opacity:.2}"><title>{} {}</title></rect>"#,
            LEFT + width * column as f64 + 1.0,
            TOP + height * row as f64 + 0.5,
            width - 2.0,
            height - 1.0,
            escaped(&site.name),
            number(value)
        );
    }
    svg.push_str("</svg>");
    svg
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_read_from_paths() {
        assert_eq!(
            place("model.layers.12.mlp.down_proj"),
            Some((12, "down_proj"))
        );
        assert_eq!(place("lm_head"), None);
        assert!(order("q_proj") < order("o_proj") && order("down_proj") < order("other"));
    }
}
