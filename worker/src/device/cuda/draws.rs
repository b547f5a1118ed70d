//! Draws and scores on the GPU: what `sample.cu` is told of a step, where it leaves what came of it, and the counts of
//! tokens that penalties need, which stay on the GPU.
//!
//! A step's draws are gathered in page-locked memory and copied once, like its metadata. A slot's row of counts follows
//! its sequence from token to token; when another sequence has the slot, or the same one was computed again, the row is
//! made anew from the tokens. What does not fit the room here (many edits, long lists of alternatives) is left to the
//! samplers, and so is everything where ranks hold shards of different sizes.

use std::sync::Arc;

use swallow_schedule::SeqId;

use super::{
    CudaDevice, CudaSpec, F32,
    driver::Gpu,
    head::{HARD_TOP_MIN, LATER_MAX, batch, locked},
    launch::Arg,
    memory::{Memory, Pinned, Plain},
    upload::NO_SLOT,
};
use crate::{
    device::{AHEAD_MAX, DeviceError, HeadAsk, HeadUse, StepMeta},
    sampling::{Choice, Draw, LogSoftmax, TokenScore},
};

/// Edits of a step that have room.
const EDITS_ROOM: usize = 16 << 10;
/// Listed alternatives of a step that have room, for each row of the largest step.
const LISTED_A_ROW: usize = 24;
/// The weight of the likeliest token is at most this power of two: more than the digits of an exponential.
const UNIT_BITS_MAX: u32 = 45;
/// Blocks that survey a row.
const PARTS: usize = 16;
/// Threads of a block that draws.
const THREADS: u32 = 512;

const PENALISES: u32 = 1;
const SCORED: u32 = 2;
const ONLY_SCORED: u32 = 4;

/// A draw, as `sample.cu` reads it.
#[derive(Clone, Copy)]
#[repr(C)]
struct Record {
    row: u32,
    slot: u32,
    temperature: f32,
    top_p: f32,
    top_k: u32,
    min_p: f32,
    penalties: [f32; 3],
    flags: u32,
    n_top: u32,
    token: u32,
    bits: [u32; 2],
    first_edit: u32,
    n_edits: u32,
    first_top: u32,
    unused: [u32; 3],
}

/// What came of it, as `sample.cu` writes it.
#[derive(Clone, Copy)]
#[repr(C)]
struct Outcome {
    token: u32,
    rank: u32,
    logit: f32,
    most: f32,
    log_sum: f64,
    bad: u32,
    n_listed: u32,
}

/// A listed token, or an edit: a token and a number.
#[derive(Clone, Copy)]
#[repr(C)]
struct Pair {
    token: u32,
    number: f32,
}

// All are made of 32-bit and 64-bit numbers without gaps.
impl Plain for Record {}
impl Plain for Outcome {}
impl Plain for Pair {}

/// Bytes that `survey_rows` leaves of a part of a row.
const PART_BYTES: usize = 24;

/// One draw of a step.
#[derive(Clone, Copy, Debug)]
pub(super) struct Drawn {
    /// Index among the step's asks.
    pub(super) ask: usize,
    scored: bool,
    first_top: usize,
}

/// How the asks of a step are answered. Those in none of the lists are plain.
#[derive(Default)]
pub(super) struct Plan {
    /// By the GPU, in ascending order.
    pub(super) drawn: Vec<Drawn>,
    /// By samplers, before anything goes on, in ascending order.
    pub(super) hard: Vec<usize>,
    /// By samplers, when the step has landed, in ascending order: no row waits for their tokens.
    pub(super) later: Vec<usize>,
    n_edits: usize,
    n_listed: usize,
}

/// The buffers.
pub(super) struct Draws {
    records: Memory,
    edits: Memory,
    olds: Memory,
    parts: Memory,
    outcomes: Memory,
    listed: Memory,
    /// How often each token was generated and whether the prompt has it, a row a slot.
    seen: Memory,
    /// Numbers of a row.
    seen_stride: usize,
    /// Tokens on their way to the counts.
    history: Memory,
    /// Logits of all ranks, in a group of several.
    gathered: Option<Memory>,
    /// Whose tokens a slot's row counts, up to which generated one.
    counted: Vec<Option<(SeqId, u32)>>,
    sides: [Side; AHEAD_MAX],
    /// The weight of the likeliest token.
    unit: f32,
}

/// A step's part of the host's memory; steps take turns.
struct Side {
    records: Pinned<Record>,
    edits: Pinned<Pair>,
    outcomes: Pinned<Outcome>,
    listed: Pinned<Pair>,
}

fn listed_room(spec: &CudaSpec) -> usize {
    LISTED_A_ROW * spec.max_rows
}

fn seen_stride(spec: &CudaSpec) -> usize {
    spec.split.n_vocab().next_multiple_of(8)
}

/// Whether all ranks hold as many tokens.
fn is_even(spec: &CudaSpec) -> bool {
    spec.split.n_vocab().is_multiple_of(spec.shard.of)
}

/// Bytes of each buffer, in the order of [`Draws::new`].
fn sizes(spec: &CudaSpec) -> [usize; 9] {
    let shared = spec.shard.of > 1 && is_even(spec);
    [
        spec.max_rows * size_of::<Record>(),
        EDITS_ROOM * size_of::<Pair>(),
        EDITS_ROOM * F32,
        batch(spec) * PARTS * PART_BYTES,
        spec.max_rows * size_of::<Outcome>(),
        listed_room(spec) * size_of::<Pair>(),
        spec.max_running * seen_stride(spec) * size_of::<u16>(),
        spec.max_model_len * size_of::<u32>(),
        if shared {
            batch(spec) * spec.split.n_vocab() * F32
        } else {
            0
        },
    ]
}

pub(super) fn planned_bytes(spec: &CudaSpec) -> usize {
    sizes(spec).iter().sum()
}

impl Draws {
    pub(super) fn new(gpu: &Arc<Gpu>, spec: &CudaSpec) -> Result<Self, DeviceError> {
        let make = |bytes| gpu.alloc(bytes, "sampling");
        let [
            records,
            edits,
            olds,
            parts,
            outcomes,
            listed,
            seen,
            history,
            gathered,
        ] = sizes(spec);
        let side = || -> Result<Side, DeviceError> {
            Ok(Side {
                records: gpu.pinned(spec.max_rows)?,
                edits: gpu.pinned(EDITS_ROOM)?,
                outcomes: gpu.pinned(spec.max_rows)?,
                listed: gpu.pinned(listed_room(spec))?,
            })
        };
        let vocab_bits = spec.split.n_vocab().next_power_of_two().ilog2();
        Ok(Self {
            records: make(records)?,
            edits: make(edits)?,
            olds: make(olds)?,
            parts: make(parts)?,
            outcomes: make(outcomes)?,
            listed: make(listed)?,
            seen: make(seen)?,
            seen_stride: seen_stride(spec),
            history: make(history)?,
            gathered: (gathered > 0).then(|| make(gathered)).transpose()?,
            counted: vec![None; spec.max_running],
            sides: [side()?, side()?],
            unit: 2f32.powi(UNIT_BITS_MAX.min(63 - vocab_bits) as i32),
        })
    }

    pub(super) fn bytes(&self) -> usize {
        let buffers = [
            &self.records,
            &self.edits,
            &self.olds,
            &self.parts,
            &self.outcomes,
            &self.listed,
            &self.seen,
            &self.history,
        ];
        let shared = self.gathered.as_ref().map_or(0, |memory| memory.bytes);
        buffers.iter().map(|memory| memory.bytes).sum::<usize>() + shared
    }

    /// Puts a draw to the others of the step; false if there is no room.
    fn push(
        &mut self,
        plan: &mut Plan,
        side: usize,
        ask: (usize, &HeadAsk),
        what: &What,
        row: usize,
    ) -> bool {
        let (scored, n_top) = match what.logprobs {
            Some(n_top) => (true, n_top as usize),
            None => (false, 0),
        };
        let edits = what.draw.as_ref().map_or(&[][..], |draw| &draw.edits);
        let side = &mut self.sides[side];
        let fits = plan.n_edits + edits.len() <= side.edits.len()
            && plan.n_listed + n_top <= side.listed.len()
            && n_top < HARD_TOP_MIN;
        if !fits {
            return false;
        }
        for (to, &(token, number)) in side.edits[plan.n_edits..].iter_mut().zip(edits) {
            *to = Pair { token, number };
        }
        let penalises = what.draw.as_ref().is_some_and(|draw| draw.penalises);
        let flag = |on: bool, flag: u32| if on { flag } else { 0 };
        let bits = what.draw.as_ref().map_or(0, |draw| draw.bits);
        side.records[plan.drawn.len()] = Record {
            row: row as u32,
            slot: what.slot,
            temperature: what.draw.as_ref().map_or(0.0, |draw| draw.temperature),
            top_p: what.draw.as_ref().map_or(1.0, |draw| draw.top_p),
            top_k: what.draw.as_ref().map_or(0, |draw| draw.top_k),
            min_p: what.draw.as_ref().map_or(0.0, |draw| draw.min_p),
            penalties: what.draw.as_ref().map_or([1.0, 0.0, 0.0], |draw| draw.penalties),
            flags: flag(penalises, PENALISES) | flag(scored, SCORED) | flag(what.draw.is_none(), ONLY_SCORED),
            n_top: n_top as u32,
            token: what.token,
            bits: [bits as u32, (bits >> 32) as u32],
            first_edit: plan.n_edits as u32,
            n_edits: edits.len() as u32,
            first_top: plan.n_listed as u32,
            unused: [0; 3],
        };
        plan.drawn.push(Drawn {
            ask: ask.0,
            scored,
            first_top: plan.n_listed,
        });
        plan.n_edits += edits.len();
        plan.n_listed += n_top;
        true
    }

    /// Token and score of the `at`-th draw of a step that is done.
    pub(super) fn read(
        &self,
        side: usize,
        at: usize,
        drawn: &Drawn,
        ask: &HeadAsk,
    ) -> Result<(u32, Option<TokenScore>), DeviceError> {
        let side = &self.sides[side];
        let outcome = side.outcomes[at];
        if outcome.bad != 0 {
            return Err(DeviceError::NotFinite {
                seq: ask.seq.0,
                position: ask.position,
            });
        }
        let score = drawn.scored.then(|| {
            let listed = &side.listed[drawn.first_top..][..outcome.n_listed as usize];
            let mut listed: Vec<(u32, f32)> = listed.iter().map(|pair| (pair.token, pair.number)).collect();
            listed.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
            let logprob = |logit| LogSoftmax::logprob_of(logit, outcome.most, outcome.log_sum);
            TokenScore {
                token: outcome.token,
                logprob: logprob(outcome.logit),
                rank: outcome.rank,
                top: listed
                    .into_iter()
                    .map(|(token, logit)| (token, logprob(logit)))
                    .collect(),
            }
        });
        Ok((outcome.token, score))
    }
}

/// What an ask wants.
struct What {
    slot: u32,
    /// `None`: a given token is scored.
    draw: Option<Draw>,
    token: u32,
    logprobs: Option<u32>,
}

/// `None` for a plain ask.
fn what(ask: &HeadAsk, n_vocab: usize) -> Option<What> {
    let (sampler, next) = (locked(ask), ask.position + 1);
    match ask.what {
        HeadUse::Sample { index, slot } => match sampler.choice(index, next, n_vocab) {
            Choice::Plain => None,
            Choice::Drawn(draw) => Some(What {
                slot,
                token: 0,
                logprobs: draw.logprobs,
                draw: Some(draw),
            }),
        },
        HeadUse::Score => Some(What {
            slot: NO_SLOT,
            draw: None,
            token: sampler.prompt()[next as usize],
            logprobs: Some(sampler.params().prompt_logprobs.unwrap_or(0)),
        }),
    }
}

impl CudaDevice {
    /// Decides who answers each ask, and brings the GPU what it needs for its part.
    pub(super) fn plan_draws(&mut self, meta: &StepMeta, side: usize) -> Result<Plan, DeviceError> {
        let mut plan = Plan::default();
        let even = is_even(&self.spec);
        for (i, ask) in meta.asks.iter().enumerate() {
            if matches!(ask.what, HeadUse::Sample { .. }) && locked(ask).params().grammar.is_some() {
                // Only the sampler knows which tokens may come. The scheduler plans no row of the sequence until it has
                // this token.
                match plan.later.len() < LATER_MAX {
                    true => plan.later.push(i),
                    false => plan.hard.push(i),
                }
                continue;
            }
            let Some(what) = what(ask, self.spec.split.n_vocab()) else {
                continue;
            };
            let row = i % self.head.batch();
            if !even || !self.draws.push(&mut plan, side, (i, ask), &what, row) {
                plan.hard.push(i);
            } else if let (HeadUse::Sample { index, slot }, Some(Draw { penalises: true, .. })) =
                (ask.what, &what.draw)
            {
                self.count_before(ask, slot as usize, index)?;
            }
        }
        if !plan.drawn.is_empty() {
            let (gpu, draws) = (&self.gpu, &self.draws);
            let host = &draws.sides[side];
            gpu.copy_in(draws.records.address, &host.records[..plan.drawn.len()])?;
            gpu.copy_in(draws.edits.address, &host.edits[..plan.n_edits])?;
        }
        Ok(plan)
    }

    /// Makes a slot's counts those of the tokens before generated token `index`, unless they are.
    fn count_before(&mut self, ask: &HeadAsk, slot: usize, index: u32) -> Result<(), DeviceError> {
        let now = self.draws.counted[slot].replace((ask.seq, index + 1));
        if now == Some((ask.seq, index)) {
            return Ok(());
        }
        // The sampler must know all of them.
        self.land_all()?;
        let (tokens, n_prompt) = locked(ask).before(index);
        let draws = &self.draws;
        let bytes = draws.seen_stride * size_of::<u16>();
        let row = draws.seen.at(slot * bytes);
        self.gpu.clear_part(&draws.seen, slot * bytes, bytes)?;
        // The driver takes the numbers before the call returns: they are not in page-locked memory.
        self.gpu.copy_in(draws.history.address, &tokens)?;
        let mut arguments = [
            row.into(),
            (&draws.history).into(),
            (n_prompt as u32).into(),
            (tokens.len() as u32).into(),
        ];
        let blocks = (tokens.len() as u32).div_ceil(256).clamp(1, 64);
        // SAFETY: the parameters of `count_tokens`; tokens were checked against the vocabulary, and are fewer than the
        // longest sequence's.
        unsafe {
            self.gpu.launch(
                &self.kernels.count_tokens,
                [blocks, 1, 1],
                [256, 1, 1],
                0,
                &mut arguments,
            )
        }
    }

    /// Draws and scores rows of a batch of `n_rows` rows of logits: those of the `range` of the step's draws.
    pub(super) fn draw_rows(
        &mut self,
        range: std::ops::Range<usize>,
        n_rows: usize,
    ) -> Result<(), DeviceError> {
        let n = range.len() as u32;
        if n == 0 {
            return Ok(());
        }
        let (n_vocab, n_ranks) = (self.spec.split.n_vocab(), self.spec.shard.of);
        let shard = n_vocab / n_ranks;
        if let Some(to) = self.draws.gathered.as_ref().map(|gathered| gathered.address) {
            let (from, n) = (self.head.logits().address, n_rows * shard * F32);
            self.between_ranks("ncclAllGather", |comm| comm.gather(from, to, n))?;
        }
        let draws = &self.draws;
        let logits = draws.gathered.as_ref().unwrap_or(self.head.logits());
        let records = draws.records.at(range.start * size_of::<Record>());
        let whole = [n_vocab, draws.seen_stride, shard, n_ranks, n_rows].map(|n| Arg::from(n as u32));
        let given = [
            logits.into(),
            records.into(),
            (&draws.edits).into(),
            (&draws.olds).into(),
        ];
        let mut survey = [&given[..], &[(&draws.seen).into(), (&draws.parts).into()], &whole].concat();
        let outcomes = draws.outcomes.at(range.start * size_of::<Outcome>());
        let found = [
            (&draws.seen).into(),
            (&draws.parts).into(),
            (PARTS as u32).into(),
            outcomes.into(),
            (&draws.listed).into(),
            self.head.last().into(),
        ];
        let mut sample = [&given[..], &found, &whole, &[draws.unit.into()]].concat();
        // SAFETY: the parameters of `survey_rows` and `sample_rows`; rows, slots, edits and lists have room, which was
        // seen to when they were planned.
        unsafe {
            let grid = [PARTS as u32, n, 1];
            self.gpu
                .launch(&self.kernels.survey_rows, grid, [256, 1, 1], 0, &mut survey)?;
            let grid = [n, 1, 1];
            self.gpu
                .launch(&self.kernels.sample_rows, grid, [THREADS, 1, 1], 0, &mut sample)
        }
    }

    /// Sends what came of a step's draws on its way to the host.
    pub(super) fn fetch_draws(&mut self, plan: &Plan, side: usize) -> Result<(), DeviceError> {
        if plan.drawn.is_empty() {
            return Ok(());
        }
        let (gpu, draws) = (&self.gpu, &mut self.draws);
        let side = &mut draws.sides[side];
        gpu.copy_out(&mut side.outcomes[..plan.drawn.len()], draws.outcomes.address)?;
        gpu.copy_out(&mut side.listed[..plan.n_listed], draws.listed.address)
    }
}
