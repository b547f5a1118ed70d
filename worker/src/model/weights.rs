//! Where a model's numbers come from: the files of a checkpoint, or a formula that needs none.
//!
//! Dummy weights serve to measure speed and memory of a shape without its files. Each number is a function of its
//! tensor's name and its place in the whole tensor, so a model is the same at any degree of tensor parallelism and on
//! any device. Matrices are normal with variance 1 over their inputs, so activations keep their size; norms are 1.

use std::{ops::Range, sync::Arc};

use super::{Cut, Slice};
use crate::{
    checkpoint::{Checkpoint, LlamaConfig},
    device::{Part, RandomTensor, Source},
};

/// Where the numbers of all tensors come from.
#[derive(Clone, Debug)]
pub enum Weights {
    /// Files.
    Checkpoint(Arc<Checkpoint>),
    /// A formula.
    Dummy(Arc<Dummy>),
}

/// Weights from a formula.
#[derive(Clone, Debug)]
pub struct Dummy {
    /// Shape and arithmetic of the model.
    pub config: LlamaConfig,
    /// Queries are this many times as large. With 1 attention is nearly even over all positions, as untrained models'
    /// is; with more it looks at few, as trained models' does, and a wrong position shows.
    pub query_gain: f32,
}

impl From<LlamaConfig> for Weights {
    fn from(config: LlamaConfig) -> Self {
        Self::Dummy(Arc::new(Dummy {
            config,
            query_gain: 1.0,
        }))
    }
}

impl From<Arc<Checkpoint>> for Weights {
    fn from(checkpoint: Arc<Checkpoint>) -> Self {
        Self::Checkpoint(checkpoint)
    }
}

impl Weights {
    /// Shape and arithmetic of the model.
    pub fn config(&self) -> &LlamaConfig {
        match self {
            Self::Checkpoint(checkpoint) => checkpoint.config(),
            Self::Dummy(dummy) => &dummy.config,
        }
    }

    /// Outputs `outs` of a rank's slice, counted from the slice's first.
    pub fn part(&self, slice: &Slice, outs: Range<usize>) -> Part<'_> {
        let (rows, columns) = match &slice.cut {
            Cut::Rows(rows) => (rows.start + outs.start..rows.start + outs.end, 0..slice.ins),
            Cut::Columns(columns) => (outs, columns.clone()),
            Cut::Whole => (outs, 0..1),
        };
        let source = match self {
            Self::Checkpoint(checkpoint) => Source::Tensor(checkpoint.tensor(&slice.name)),
            Self::Dummy(_) if slice.cut == Cut::Whole => Source::Ones,
            Self::Dummy(dummy) => {
                let tensor = RandomTensor::new(&slice.name, slice.width);
                let gain = if slice.name.ends_with("q_proj.weight") {
                    dummy.query_gain
                } else {
                    1.0
                };
                Source::Random(tensor.amplified(gain))
            }
        };
        Part {
            source,
            rows,
            columns,
        }
    }

    /// Bytes of one number of the slice where it is read; what is made up is counted as it is kept, in bf16.
    pub fn number_bytes(&self, slice: &Slice) -> usize {
        match self {
            Self::Checkpoint(checkpoint) => checkpoint.tensor(&slice.name).dtype().size(),
            Self::Dummy(_) => 2,
        }
    }
}
