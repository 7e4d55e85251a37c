//! Which GGUF tensor becomes which Hugging Face tensor, with the order of its rows.

use std::collections::HashSet;

use super::Findings;
use super::architecture::Architecture;
use super::source::Source;

/// Order of a written tensor's rows in terms of the file's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RowOrder {
    AsStored,
    /// llama.cpp interleaves the two halves of each head, for its own form of the rotary embedding; this undoes it.
    Unpermuted {
        head_dim: usize,
    },
}

impl RowOrder {
    /// The file's row that becomes row `row`.
    ///
    /// Within a head of size d, Hugging Face's row `j d/2 + i` (j = 0, 1) is llama.cpp's row `2 i + j`.
    pub(super) fn source_row(self, row: usize) -> usize {
        match self {
            Self::AsStored => row,
            Self::Unpermuted { head_dim } => {
                let (head, within) = (row / head_dim, row % head_dim);
                let (half, idx) = (within / (head_dim / 2), within % (head_dim / 2));
                head * head_dim + 2 * idx + half
            }
        }
    }
}

/// One tensor to write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Planned {
    /// Name in the GGUF file.
    pub(super) source: String,
    /// Name in the Hugging Face directory.
    pub(super) name: String,
    pub(super) shape: Vec<usize>,
    pub(super) order: RowOrder,
}

impl Planned {
    pub(super) fn n_elements(&self) -> u64 {
        self.shape.iter().map(|size| *size as u64).product()
    }
}

/// Every tensor of the model in the order of its names; what is missing, superfluous or misshapen becomes a problem.
pub(super) fn plan(
    source: &Source,
    architecture: &Architecture,
    findings: &mut Findings,
) -> Vec<Planned> {
    let mut plan = expected(architecture);
    plan.sort_by(|left, right| left.name.cmp(&right.name));
    for planned in &plan {
        match source.tensor(&planned.source) {
            None => findings.problem(
                "missing",
                planned.source.as_str(),
                "missing",
                "the file holds no whole model",
            ),
            Some(tensor) if tensor.shape != planned.shape => {
                let message = format!("shape {:?}, expected {:?}", tensor.shape, planned.shape);
                findings.problem("shape", planned.source.as_str(), message, "");
            }
            Some(tensor) => {
                if let Some(reason) = tensor.unreadable(planned.order != RowOrder::AsStored) {
                    let fix =
                        "supported: F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K to Q6_K";
                    findings.problem("block_format", planned.source.as_str(), reason, fix);
                }
            }
        }
    }
    let known: HashSet<&str> = plan.iter().map(|planned| planned.source.as_str()).collect();
    for name in source.tensor_names() {
        // Read as rotary scaling.
        if name != "rope_freqs.weight" && !known.contains(name) {
            let message = format!("has no place in a {} model", architecture.family.class());
            findings.problem("unknown_tensor", name, message, "");
        }
    }
    plan
}

fn expected(architecture: &Architecture) -> Vec<Planned> {
    let Architecture {
        family,
        hidden_size,
        intermediate_size,
        n_heads,
        n_kv_heads,
        head_dim,
        ..
    } = *architecture;
    let (queries, keys) = (n_heads * head_dim, n_kv_heads * head_dim);
    let rotary = if family.permuted() {
        RowOrder::Unpermuted { head_dim }
    } else {
        RowOrder::AsStored
    };
    let stored = RowOrder::AsStored;
    let mut plan = Vec::new();
    let mut add = |source: String, name: String, shape: &[usize], order| {
        plan.push(Planned {
            source,
            name,
            shape: shape.to_vec(),
            order,
        });
    };
    let embedding = [architecture.vocab_size, hidden_size];
    add(
        "token_embd.weight".into(),
        "model.embed_tokens.weight".into(),
        &embedding,
        stored,
    );
    add(
        "output_norm.weight".into(),
        "model.norm.weight".into(),
        &[hidden_size],
        stored,
    );
    if !architecture.tied {
        add(
            "output.weight".into(),
            "lm_head.weight".into(),
            &embedding,
            stored,
        );
    }
    let linears = [
        (
            "attn_q",
            "self_attn.q_proj",
            [queries, hidden_size],
            rotary,
            architecture.qkv_bias,
        ),
        (
            "attn_k",
            "self_attn.k_proj",
            [keys, hidden_size],
            rotary,
            architecture.qkv_bias,
        ),
        (
            "attn_v",
            "self_attn.v_proj",
            [keys, hidden_size],
            stored,
            architecture.qkv_bias,
        ),
        (
            "attn_output",
            "self_attn.o_proj",
            [hidden_size, queries],
            stored,
            architecture.output_bias,
        ),
        (
            "ffn_gate",
            "mlp.gate_proj",
            [intermediate_size, hidden_size],
            stored,
            architecture.mlp_bias,
        ),
        (
            "ffn_up",
            "mlp.up_proj",
            [intermediate_size, hidden_size],
            stored,
            architecture.mlp_bias,
        ),
        (
            "ffn_down",
            "mlp.down_proj",
            [hidden_size, intermediate_size],
            stored,
            architecture.mlp_bias,
        ),
    ];
    let mut norms = vec![
        ("attn_norm", "input_layernorm", hidden_size),
        ("ffn_norm", "post_attention_layernorm", hidden_size),
    ];
    if family == super::architecture::Family::Qwen3 {
        norms.push(("attn_q_norm", "self_attn.q_norm", head_dim));
        norms.push(("attn_k_norm", "self_attn.k_norm", head_dim));
    }
    for layer in 0..architecture.n_layers {
        for (source, name, size) in &norms {
            let (source, name) = (
                format!("blk.{layer}.{source}"),
                format!("model.layers.{layer}.{name}"),
            );
            add(
                format!("{source}.weight"),
                format!("{name}.weight"),
                &[*size],
                stored,
            );
        }
        for (source, name, shape, order, biased) in &linears {
            let (source, name) = (
                format!("blk.{layer}.{source}"),
                format!("model.layers.{layer}.{name}"),
            );
            add(
                format!("{source}.weight"),
                format!("{name}.weight"),
                shape,
                *order,
            );
            if *biased {
                add(
                    format!("{source}.bias"),
                    format!("{name}.bias"),
                    &shape[..1],
                    *order,
                );
            }
        }
    }
    plan
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What llama.cpp's converter does: reshape to [heads, 2, d/2], swap the last two axes.
    fn permute(rows: &[usize], head_dim: usize) -> Vec<usize> {
        let mut permuted = Vec::new();
        for head in rows.chunks(head_dim) {
            for idx in 0..head_dim / 2 {
                permuted.extend([head[idx], head[head_dim / 2 + idx]]);
            }
        }
        permuted
    }

    #[test]
    fn unpermute_inverts_permute() {
        for (heads, head_dim) in [(1, 2), (3, 4), (2, 6), (9, 64)] {
            let rows: Vec<usize> = (0..heads * head_dim).collect();
            let permuted = permute(&rows, head_dim);
            let order = RowOrder::Unpermuted { head_dim };
            let restored: Vec<usize> = rows
                .iter()
                .map(|row| permuted[order.source_row(*row)])
                .collect();
            assert_eq!(restored, rows);
            assert!(head_dim == 2 || permuted != rows);
        }
    }
}
