//! Which part of which tensor a rank holds, as plain data.
//!
//! Queries, keys, values, gate and up are cut by outputs, so that a rank computes whole heads and whole neurons; the
//! two projections back into the residual stream are cut by inputs, and their results summed over ranks. Embedding
//! and head are cut by tokens. Norms are whole on every rank. A head of keys and values is held by several ranks when
//! there are fewer such heads than ranks.

use std::ops::Range;

use crate::{checkpoint::LlamaConfig, device::Heads};

/// One rank of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    /// From 0.
    pub rank: usize,
    /// Ranks of the group.
    pub of: usize,
}

/// Part of a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cut {
    /// Rows: outputs of a linear map, or tokens.
    Rows(Range<usize>),
    /// Columns: inputs of a linear map.
    Columns(Range<usize>),
    /// All of a vector.
    Whole,
}

/// Part of a tensor of the checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slice {
    /// The tensor's name.
    pub name: String,
    /// The part.
    pub cut: Cut,
    /// Outputs and inputs of the part; a vector has one input.
    pub outs: usize,
    /// See `outs`.
    pub ins: usize,
    /// Numbers in a row of the whole tensor.
    pub width: usize,
}

/// What one rank holds of a layer. Slices of one field become one matrix, in this order.
#[derive(Clone, Debug)]
pub struct LayerSlices {
    /// Before attention.
    pub attention_norm: Slice,
    /// Queries, keys, values.
    pub qkv: [Slice; 3],
    /// Back into the residual stream.
    pub attention_out: Slice,
    /// Before the feed-forward network.
    pub mlp_norm: Slice,
    /// Gate, up.
    pub gate_up: [Slice; 2],
    /// Back into the residual stream.
    pub down: Slice,
}

/// What one rank holds of a model.
#[derive(Clone, Debug)]
pub struct Slices {
    /// Tokens of this rank.
    pub embedding: Slice,
    /// In order.
    pub layers: Vec<LayerSlices>,
    /// Before the head.
    pub norm: Slice,
    /// Tokens of this rank; `None` if it is the embedding.
    pub head: Option<Slice>,
}

impl Shard {
    /// This rank's part of `n` things, as even as possible.
    pub fn part(&self, n: usize) -> Range<usize> {
        n * self.rank / self.of..n * (self.rank + 1) / self.of
    }

    /// This rank's heads. The checkpoint was checked for this group size: query heads divide evenly.
    pub fn heads(&self, config: &LlamaConfig) -> Heads {
        Heads {
            n_q: self.part(config.n_heads).len(),
            n_kv: self.kv_heads(config.n_kv_heads).len(),
            dim: config.head_dim,
        }
    }

    /// With fewer heads than ranks, neighbouring ranks share one.
    fn kv_heads(&self, n: usize) -> Range<usize> {
        if n >= self.of {
            self.part(n)
        } else {
            let head = self.rank * n / self.of;
            head..head + 1
        }
    }

    /// Everything this rank holds.
    pub fn slices(&self, config: &LlamaConfig) -> Slices {
        let hidden = config.hidden_size;
        let vocab = self.part(config.vocab_size);
        Slices {
            embedding: rows("model.embed_tokens.weight".into(), vocab.clone(), hidden),
            layers: (0..config.n_layers)
                .map(|layer| self.layer(config, layer))
                .collect(),
            norm: whole("model.norm.weight".into(), hidden),
            head: (!config.tie_word_embeddings).then(|| rows("lm_head.weight".into(), vocab, hidden)),
        }
    }

    fn layer(&self, config: &LlamaConfig, layer: usize) -> LayerSlices {
        let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
        let (hidden, dim) = (config.hidden_size, config.head_dim);
        let heads = |range: Range<usize>| range.start * dim..range.end * dim;
        let q = heads(self.part(config.n_heads));
        let kv = heads(self.kv_heads(config.n_kv_heads));
        let inner = self.part(config.intermediate_size);
        LayerSlices {
            attention_norm: whole(name("input_layernorm"), hidden),
            qkv: [
                rows(name("self_attn.q_proj"), q.clone(), hidden),
                rows(name("self_attn.k_proj"), kv.clone(), hidden),
                rows(name("self_attn.v_proj"), kv, hidden),
            ],
            attention_out: columns(name("self_attn.o_proj"), q, hidden, config.n_heads * dim),
            mlp_norm: whole(name("post_attention_layernorm"), hidden),
            gate_up: [
                rows(name("mlp.gate_proj"), inner.clone(), hidden),
                rows(name("mlp.up_proj"), inner.clone(), hidden),
            ],
            down: columns(name("mlp.down_proj"), inner, hidden, config.intermediate_size),
        }
    }
}

impl LayerSlices {
    fn iter(&self) -> impl Iterator<Item = &Slice> {
        let matrices = self
            .qkv
            .iter()
            .chain(&self.gate_up)
            .chain([&self.attention_out, &self.down]);
        matrices.chain([&self.attention_norm, &self.mlp_norm])
    }
}

impl Slices {
    /// All of them, in no particular order.
    pub fn iter(&self) -> impl Iterator<Item = &Slice> {
        let layers = self.layers.iter().flat_map(LayerSlices::iter);
        layers.chain([&self.embedding, &self.norm]).chain(&self.head)
    }
}

fn rows(name: String, range: Range<usize>, ins: usize) -> Slice {
    Slice {
        name,
        outs: range.len(),
        ins,
        width: ins,
        cut: Cut::Rows(range),
    }
}

fn columns(name: String, range: Range<usize>, outs: usize, width: usize) -> Slice {
    Slice {
        name,
        outs,
        ins: range.len(),
        width,
        cut: Cut::Columns(range),
    }
}

fn whole(name: String, len: usize) -> Slice {
    Slice {
        name,
        cut: Cut::Whole,
        outs: len,
        ins: 1,
        width: 1,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::checkpoint::{Rope, RopeScaling};

    fn config(n_heads: usize, n_kv_heads: usize, vocab_size: usize) -> LlamaConfig {
        LlamaConfig {
            hidden_size: 64,
            n_layers: 2,
            n_heads,
            n_kv_heads,
            head_dim: 8,
            intermediate_size: 96,
            vocab_size,
            max_position_embeddings: 128,
            rms_norm_eps: 1e-5,
            rope: Rope {
                theta: 10_000.0,
                scaling: RopeScaling::None,
            },
            tie_word_embeddings: false,
            bos_token_id: None,
            eos_token_ids: Vec::new(),
        }
    }

    /// How often each row or column of each tensor is held by some rank.
    fn held(config: &LlamaConfig, of: usize) -> BTreeMap<String, Vec<usize>> {
        let mut held: BTreeMap<String, Vec<usize>> = BTreeMap::new();
        for rank in 0..of {
            for slice in (Shard { rank, of }).slices(config).iter() {
                let range = match &slice.cut {
                    Cut::Rows(range) | Cut::Columns(range) => range.clone(),
                    Cut::Whole => 0..slice.outs,
                };
                let counts = held.entry(slice.name.clone()).or_default();
                counts.resize(counts.len().max(range.end), 0);
                counts[range].iter_mut().for_each(|n| *n += 1);
            }
        }
        held
    }

    #[test]
    fn ranks_hold_everything_once_but_norms_and_shared_heads() {
        for (n_heads, n_kv, vocab, of) in [
            (8, 4, 101, 1),
            (8, 4, 101, 2),
            (8, 4, 101, 4),
            (9, 3, 7, 3),
            (8, 1, 13, 4),
        ] {
            let config = config(n_heads, n_kv, vocab);
            for (name, counts) in held(&config, of) {
                let want = match &name {
                    n if n.contains("norm") => of,
                    n if n.contains("k_proj") || n.contains("v_proj") => (of / n_kv).max(1),
                    _ => 1,
                };
                assert!(counts.iter().all(|&n| n == want), "{name} at TP {of}: {counts:?}");
                if name.contains("embed") {
                    assert_eq!(counts.len(), vocab);
                }
            }
        }
    }
}
