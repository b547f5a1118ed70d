//! Llama: pre-norm decoder layers with grouped-query attention and a gated feed-forward network.
//!
//! One pass serves prefill and decode: it sees rows, and the device knows which sequences they belong to. Queries, keys
//! and values are one matrix, gate and up another, so a layer is four matrix products over all rows of the step.

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use super::{
    Shard, Slice, Weights,
    rotary::inverse_frequencies,
    shard::{LayerSlices, Slices},
};
use crate::device::{Device, DeviceError, Heads, KvShape, Norm, StepMeta, VocabSplit};

/// Numbers of a tensor that are brought over at a time while loading: 16 MiB of fp32 beside the loaded weights.
const LOAD_CHUNK: usize = 4 << 20;

/// What a rank needs beside the checkpoint.
#[derive(Clone, Debug)]
pub struct LlamaSpec {
    /// This rank's part of the weights.
    pub shard: Shard,
    /// The vocabulary over the ranks that run.
    pub split: VocabSplit,
    /// Blocks in the pool.
    pub n_blocks: usize,
    /// Tokens in one block.
    pub block_tokens: usize,
    /// Random numbers for keys and values to begin with.
    pub random_kv: bool,
}

/// One rank's weights, keys and values, and activations.
pub struct Llama<D: Device> {
    inv_freq: D::Vector,
    net: Net<D>,
}

/// What a forward pass uses: all but the rotary frequencies, which belong to the step.
struct Net<D: Device> {
    heads: Heads,
    split: VocabSplit,
    embedding: D::Matrix,
    layers: Vec<Layer<D>>,
    norm: Norm<D::Vector>,
    /// `None`: the embedding.
    head: Option<D::Matrix>,
    kv: D::Kv,
    work: Activations<D>,
}

struct Layer<D: Device> {
    attention_norm: Norm<D::Vector>,
    qkv: D::Matrix,
    attention_out: D::Matrix,
    mlp_norm: Norm<D::Vector>,
    gate_up: D::Matrix,
    down: D::Matrix,
}

/// Allocated once, for the largest step.
struct Activations<D: Device> {
    residual: D::Rows,
    normed: D::Rows,
    qkv: D::Rows,
    attended: D::Rows,
    partial: D::Rows,
    gate_up: D::Rows,
    inner: D::Rows,
}

impl<D: Device> Llama<D> {
    /// Loads this rank's slices and allocates everything it will ever use. `loaded` counts bytes of the files.
    ///
    /// # Errors
    /// If memory runs out.
    pub fn load(
        device: &mut D,
        weights: &Weights,
        spec: LlamaSpec,
        loaded: &AtomicU64,
    ) -> Result<Self, DeviceError> {
        let config = weights.config();
        let heads = spec.shard.heads(config);
        let slices = spec.shard.slices(config);
        // The pool first: if memory is short, it shows before minutes of loading.
        let mut kv = device.kv(KvShape {
            n_layers: config.n_layers,
            n_blocks: spec.n_blocks,
            block_tokens: spec.block_tokens,
            heads,
        })?;
        if spec.random_kv {
            device.randomise(&mut kv)?;
        }
        let hidden = config.hidden_size;
        let inner = slices.layers.first().map_or(0, |layer| layer.down.ins);
        let work = Activations {
            residual: device.residual(hidden)?,
            normed: device.rows(hidden)?,
            qkv: device.rows(heads.qkv_width())?,
            attended: device.rows(heads.n_q * heads.dim)?,
            partial: device.rows(hidden)?,
            gate_up: device.rows(2 * inner)?,
            inner: device.rows(inner)?,
        };
        let mut loader = Loader {
            device,
            weights,
            loaded,
            eps: config.rms_norm_eps as f32,
        };
        let Slices {
            embedding,
            layers,
            norm,
            head,
        } = &slices;
        let net = Net {
            heads,
            split: spec.split,
            embedding: loader.matrix(std::slice::from_ref(embedding))?,
            layers: layers
                .iter()
                .map(|layer| loader.layer(layer))
                .collect::<Result<_, _>>()?,
            norm: loader.norm(norm)?,
            head: head
                .as_ref()
                .map(|head| loader.matrix(std::slice::from_ref(head)))
                .transpose()?,
            kv,
            work,
        };
        let inv_freq = device.vector(&inverse_frequencies(&config.rope, config.head_dim))?;
        let mut llama = Self { inv_freq, net };
        llama.net.prepare(device)?;
        llama.record(device)?;
        Ok(llama)
    }

    fn record(&mut self, device: &mut D) -> Result<(), DeviceError> {
        let Self { inv_freq, net } = self;
        for rows in device.recordable() {
            let rotary = (&*inv_freq, net.heads.dim / 2);
            device.record(rows, rotary, |device, step| net.pass(device, step))?;
        }
        Ok(())
    }

    /// Gives the device one step; what this rank samples and scores in it, [`Device::land`] brings.
    ///
    /// # Errors
    /// If another rank failed, or logits are not finite.
    pub fn forward(&mut self, device: &mut D, meta: Arc<StepMeta>) -> Result<(), DeviceError> {
        let net = &mut self.net;
        let step = device.begin(meta, &self.inv_freq, net.heads.dim / 2)?;
        if !device.replay(&step)? {
            net.pass(device, &step)?;
        }
        let head = net.head.as_ref().unwrap_or(&net.embedding);
        device.head_sample(step, &net.work.residual, &net.work.normed, head, &net.split)
    }
}

impl<D: Device> Net<D> {
    /// All layers have the same shapes, so one stands for all.
    fn prepare(&self, device: &mut D) -> Result<(), DeviceError> {
        let work = &self.work;
        if let Some(layer) = self.layers.first() {
            device.prepare(&work.normed, &layer.qkv, &work.qkv)?;
            device.prepare(&work.attended, &layer.attention_out, &work.partial)?;
            device.prepare(&work.normed, &layer.gate_up, &work.gate_up)?;
            device.prepare(&work.inner, &layer.down, &work.partial)?;
        }
        device.prepare_head(self.head.as_ref().unwrap_or(&self.embedding))
    }

    /// Every layer and the head, over all rows of a step.
    fn pass(&mut self, device: &mut D, step: &D::Step) -> Result<(), DeviceError> {
        let Self {
            heads,
            split,
            embedding,
            layers,
            norm,
            head,
            kv,
            work,
        } = self;
        let first = layers.first().map_or(&*norm, |layer| &layer.attention_norm);
        device.embed_norm(
            step,
            embedding,
            split,
            first,
            &mut work.residual,
            &mut work.normed,
        )?;
        for (n, layer) in layers.iter().enumerate() {
            device.linear(step, &work.normed, &layer.qkv, &mut work.qkv)?;
            device.rope_write(step, n, *heads, &mut work.qkv, kv)?;
            device.attention(step, n, *heads, &work.qkv, kv, &mut work.attended)?;
            device.linear(step, &work.attended, &layer.attention_out, &mut work.partial)?;
            device.reduce_add_norm(
                step,
                &work.partial,
                &layer.mlp_norm,
                &mut work.residual,
                &mut work.normed,
            )?;
            device.linear(step, &work.normed, &layer.gate_up, &mut work.gate_up)?;
            device.silu_mul(step, &work.gate_up, &mut work.inner)?;
            device.linear(step, &work.inner, &layer.down, &mut work.partial)?;
            let next = layers.get(n + 1).map_or(&*norm, |layer| &layer.attention_norm);
            device.reduce_add_norm(step, &work.partial, next, &mut work.residual, &mut work.normed)?;
        }
        let head = head.as_ref().unwrap_or(embedding);
        device.head(step, &work.residual, &work.normed, head, split)
    }
}

/// Moves slices from the files to the device.
struct Loader<'a, D> {
    device: &'a mut D,
    weights: &'a Weights,
    loaded: &'a AtomicU64,
    eps: f32,
}

impl<D: Device> Loader<'_, D> {
    fn layer(&mut self, slices: &LayerSlices) -> Result<Layer<D>, DeviceError> {
        Ok(Layer {
            attention_norm: self.norm(&slices.attention_norm)?,
            qkv: self.matrix(&slices.qkv)?,
            attention_out: self.matrix(std::slice::from_ref(&slices.attention_out))?,
            mlp_norm: self.norm(&slices.mlp_norm)?,
            gate_up: self.matrix(&slices.gate_up)?,
            down: self.matrix(std::slice::from_ref(&slices.down))?,
        })
    }

    fn norm(&mut self, slice: &Slice) -> Result<Norm<D::Vector>, DeviceError> {
        let values = self.weights.part(slice, 0..slice.outs).to_f32();
        self.count(slice, slice.outs);
        Ok(Norm {
            weight: self.device.vector(&values)?,
            eps: self.eps,
        })
    }

    /// One matrix of several slices, one below the other.
    fn matrix(&mut self, slices: &[Slice]) -> Result<D::Matrix, DeviceError> {
        let outs = slices.iter().map(|slice| slice.outs).sum();
        let mut matrix = self.device.matrix(outs, slices[0].ins)?;
        let mut at = 0;
        for slice in slices {
            for outs in pieces(0..slice.outs, (LOAD_CHUNK / slice.ins).max(1)) {
                let part = self.weights.part(slice, outs.clone());
                self.device.fill(&mut matrix, at, &part)?;
                at += outs.len();
                self.count(slice, outs.len() * slice.ins);
            }
        }
        Ok(matrix)
    }

    fn count(&self, slice: &Slice, n: usize) {
        let bytes = n * self.weights.number_bytes(slice);
        self.loaded.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

/// Cuts a range into ranges of at most `len`.
fn pieces(range: Range<usize>, len: usize) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    range.step_by(len).map(move |start| start..(start + len).min(end))
}
