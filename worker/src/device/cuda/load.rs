//! Weights on their way to the GPU: from the files' pages through page-locked buffers that take turns.

use std::sync::Arc;

use super::{
    driver::{Event, Gpu},
    memory::Pinned,
};
use crate::device::{DeviceError, Part};

/// Numbers of one buffer: 16 MiB of bf16.
const NUMBERS: usize = 8 << 20;

/// Two buffers: one is filled while the other is copied.
pub(super) struct Staging {
    turn: usize,
    buffers: [(Pinned<u16>, Event); 2],
}

impl Staging {
    pub(super) fn new(gpu: &Arc<Gpu>) -> Result<Self, DeviceError> {
        let buffer = || Ok::<_, DeviceError>((gpu.pinned(NUMBERS)?, gpu.event(false)?));
        Ok(Self {
            turn: 0,
            buffers: [buffer()?, buffer()?],
        })
    }

    /// Copies a part to `to`, row-major. The copy is done when the stream has come to it.
    pub(super) fn copy(&mut self, gpu: &Gpu, to: u64, part: &Part<'_>) -> Result<(), DeviceError> {
        let rows_a_time = (NUMBERS / part.columns.len().max(1)).max(1);
        let mut to = to;
        for start in part.rows.clone().step_by(rows_a_time) {
            let piece = Part {
                rows: start..(start + rows_a_time).min(part.rows.end),
                ..part.clone()
            };
            let (buffer, event) = &mut self.buffers[self.turn];
            self.turn = 1 - self.turn;
            event.wait()?; // until the last copy from it is done; at once if there was none
            let numbers = &mut buffer[..piece.len()];
            piece.read_bf16_into(numbers);
            gpu.copy_in(to, numbers)?;
            event.record()?;
            to += size_of_val(numbers) as u64;
        }
        Ok(())
    }
}
