//! The engine of the mock worker: steps over its sequences, frames for its sessions.

use std::{
    collections::{BTreeMap, HashSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use swallow_proto::prefix;
use swallow_rpc::worker::v1::{
    self as rpc, SessionResponse, finished::Reason, session_request, session_response::Frame,
};
use tokio::{sync::mpsc, time::Instant};
use tonic::Status;

use super::{Config, Inner, POISON, digest, letter, logprob, token};

/// A request's candidate.
pub(super) struct Sequence {
    pub(super) session: u64,
    pub(super) request: rpc::Request,
    pub(super) deadline: Option<Instant>,
    pub(super) begun: bool,
    pub(super) prefill_left: usize,
    pub(super) emitted: u32,
    pub(super) cancelled: bool,
}

/// A session's other end.
pub(super) struct Outgoing {
    pub(super) id: u64,
    pub(super) frames: mpsc::UnboundedSender<Result<SessionResponse, Status>>,
    pub(super) credits: i64,
    pub(super) kv_seq: u64,
}

/// Everything under one lock.
pub(super) struct Engine {
    pub(super) config: Config,
    pub(super) boot: [u8; 16],
    pub(super) sequences: VecDeque<Sequence>,
    pub(super) sessions: Vec<Outgoing>,
    pub(super) cache: VecDeque<u64>,
    pub(super) pongs: Vec<(u64, u64)>,
    pub(super) known: HashSet<(Vec<u8>, u32, u32)>,
    pub(super) next_session: u64,
    pub(super) step: u64,
    /// Tokens of the last one.
    pub(super) rows: u32,
    pub(super) dead: bool,
}

impl Sequence {
    /// It has all that its window allows.
    pub(super) fn is_parked(&self) -> bool {
        let window = self.request.window_tokens;
        window > 0 && self.request.resumed_tokens + self.emitted >= window
    }
}

impl Outgoing {
    pub(super) fn send(&self, frame: Frame) {
        // The router may be gone.
        let _ = self.frames.send(Ok(SessionResponse { frame: Some(frame) }));
    }
}

pub(super) async fn run_engine(inner: Arc<Inner>) {
    let mut due = Instant::now();
    loop {
        let (idle, step, punctual) = {
            let mut engine = inner.engine();
            engine.turn(&inner);
            if engine.dead {
                // What a crash leaves: no session, no answer.
                engine.sessions.clear();
            }
            let config = &engine.config;
            let step = config.step + config.row * engine.rows;
            (engine.is_idle(), step, config.punctual)
        };
        if idle {
            inner.work.notified().await;
            due = Instant::now();
        } else if punctual {
            due += step;
            tokio::time::sleep_until(due).await;
        } else {
            tokio::time::sleep(step).await;
        }
    }
}

impl Engine {
    pub(super) fn new(config: Config) -> Self {
        let cache = (0..u64::from(config.cached_blocks)).map(|i| i.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        Self {
            cache: cache.collect(),
            config,
            boot: *uuid::Uuid::new_v4().as_bytes(),
            sequences: VecDeque::new(),
            sessions: Vec::new(),
            pongs: Vec::new(),
            known: HashSet::new(),
            next_session: 0,
            step: 0,
            rows: 0,
            dead: false,
        }
    }

    fn is_idle(&self) -> bool {
        let stands = self.config.wedged || self.dead;
        let waits = self.config.hold || self.config.stall;
        let timed = self
            .sequences
            .iter()
            .any(|sequence| sequence.deadline.is_some() || sequence.cancelled);
        stands || (self.pongs.is_empty() && (self.sequences.is_empty() || waits && !timed))
    }

    /// One step.
    fn turn(&mut self, inner: &Inner) {
        if self.config.wedged || self.dead {
            return;
        }
        for (session, nonce) in std::mem::take(&mut self.pongs) {
            self.to(session, |to| to.send(Frame::Pong(rpc::Pong { nonce })));
        }
        self.step += 1;
        let mut frames: BTreeMap<u64, rpc::StepOutput> = BTreeMap::new();
        let mut ended: Vec<(u64, usize)> = Vec::new();
        let mut budget = self.config.step_tokens;
        let mut running = self.sequences.iter().filter(|sequence| sequence.begun).count();
        let mut stored: Vec<u64> = Vec::new();
        let mut kept = VecDeque::new();
        while let Some(mut sequence) = self.sequences.pop_front() {
            let frame = frames.entry(sequence.session).or_default();
            let handle = sequence.request.handle;
            let late = sequence
                .deadline
                .is_some_and(|deadline| deadline <= Instant::now());
            let end = if sequence.cancelled {
                Some(Reason::Cancelled)
            } else if late {
                Some(Reason::Deadline)
            } else if !sequence.begun && (self.config.hold || running >= self.config.max_running as usize) {
                None
            } else {
                if !sequence.begun {
                    running += 1;
                    let cached = self.begin(&mut sequence);
                    let prefill = sequence.prefill_left as u64;
                    inner.note(|seen| {
                        seen.cached_tokens += u64::from(cached);
                        seen.prefill_tokens += prefill;
                    });
                    frame.accepted.push(rpc::Accepted {
                        handle,
                        cached_tokens: cached,
                    });
                }
                if sequence.request.prompt_ids[0] == POISON {
                    self.dead = true;
                    return;
                }
                let marked = self.config.stall_marker == Some(sequence.request.prompt_ids[0]);
                if self.config.stall || marked {
                    None
                } else {
                    self.advance(&mut sequence, frame, &mut budget, &mut stored)
                }
            };
            match end {
                None => kept.push_back(sequence),
                Some(reason) => {
                    let miscount = u32::from(self.config.miscount);
                    frame.finished.push(rpc::Finished {
                        handle,
                        reason: reason.into(),
                        output_tokens: sequence.emitted - miscount.min(sequence.emitted),
                        message: String::new(),
                        stop_token_id: frame
                            .token_id
                            .last()
                            .copied()
                            .filter(|_| reason == Reason::StopToken),
                    });
                    ended.push((sequence.session, usize::from(reason == Reason::Cancelled)));
                }
            }
        }
        self.sequences = kept;
        self.publish(inner, frames, &ended, stored);
    }

    fn begin(&mut self, sequence: &mut Sequence) -> u32 {
        sequence.begun = true;
        let request = &sequence.request;
        let block = self.config.block_tokens as usize;
        let keys = prefix::keys(request.cache_salt, block, &request.prompt_ids);
        let hit = keys.iter().take_while(|key| self.cache.contains(key)).count();
        let hit = if request.prompt_logprobs.is_some() { 0 } else { hit };
        let cached = (hit * block).min(request.prompt_ids.len() - 1);
        sequence.prefill_left = request.prompt_ids.len() - cached;
        u32::try_from(cached).expect("small")
    }

    /// Prefill within the budget, then one token.
    fn advance(
        &mut self,
        sequence: &mut Sequence,
        frame: &mut rpc::StepOutput,
        budget: &mut usize,
        stored: &mut Vec<u64>,
    ) -> Option<Reason> {
        let request = &sequence.request;
        if sequence.prefill_left > 0 {
            let now = sequence.prefill_left.min(*budget);
            *budget -= now;
            sequence.prefill_left -= now;
            if sequence.prefill_left > 0 {
                return None;
            }
            let block = self.config.block_tokens as usize;
            stored.extend(prefix::keys(request.cache_salt, block, &request.prompt_ids));
            if request.prompt_logprobs.is_some() {
                for (position, &id) in (0..).zip(&request.prompt_ids).skip(1) {
                    push_score(frame, request.handle, position, id, request.prompt_logprobs);
                }
            }
            if request.max_tokens == 0 {
                return Some(Reason::Length);
            }
        }
        let seed = request
            .sampling
            .as_ref()
            .and_then(|sampling| sampling.seed)
            .unwrap_or(0);
        // What it continues counts as its own, as if it had been here from the first token.
        let resumed = request.resumed_tokens as usize;
        let own = &request.prompt_ids[..request.prompt_ids.len() - resumed];
        let index = request.resumed_tokens + sequence.emitted;
        if sequence.is_parked() {
            return None;
        }
        let says = &self.config.says;
        let id = match says.get(index as usize % says.len().max(1)) {
            Some(&id) => id,
            None if self.config.letters => letter(token(own, seed, request.candidate, index)),
            None => token(own, seed, request.candidate, index),
        };
        frame.handle.push(request.handle);
        frame.token_id.push(id);
        if request.logprobs.is_some() {
            let position = u32::try_from(request.prompt_ids.len()).expect("small") + sequence.emitted;
            push_score(frame, request.handle, position, id, request.logprobs);
        }
        sequence.emitted += 1;
        if request.stop_token_ids.contains(&id) && index + 1 >= request.min_tokens {
            Some(Reason::StopToken)
        } else {
            (index + 1 == request.max_tokens).then_some(Reason::Length)
        }
    }

    fn publish(
        &mut self,
        inner: &Inner,
        frames: BTreeMap<u64, rpc::StepOutput>,
        ended: &[(u64, usize)],
        stored: Vec<u64>,
    ) {
        let mut tokens = 0;
        for (session, mut frame) in frames {
            frame.step = self.step;
            tokens += frame.handle.len() as u64;
            let (load, unknown) = (self.load(), self.config.unknown_frames);
            let back = u32::try_from(ended.iter().filter(|(of, _)| *of == session).count()).expect("small");
            let give = self.config.give_credits && back > 0;
            self.to(session, |to| {
                if frame
                    != (rpc::StepOutput {
                        step: frame.step,
                        ..Default::default()
                    })
                {
                    to.send(Frame::Step(frame.clone()));
                }
                if unknown {
                    let _ = to.frames.send(Ok(SessionResponse { frame: None }));
                }
                if give {
                    to.credits += i64::from(back);
                    to.send(Frame::Credit(rpc::Credit { add_submits: back }));
                }
                to.send(Frame::Load(load));
            });
        }
        self.rows = u32::try_from(tokens).expect("small");
        self.store(stored);
        let (running, waiting) = self.counts();
        inner.note(|seen| {
            seen.tokens += tokens;
            seen.steps += 1;
            seen.finished += ended.len() as u64;
            seen.confirmed += ended.iter().map(|(_, cancelled)| *cancelled as u64).sum::<u64>();
            (seen.running, seen.waiting) = (running, waiting);
            seen.most_running = seen.most_running.max(running);
        });
        let total = inner.seen.borrow().tokens;
        self.dead |= self.config.die_after.is_some_and(|after| total >= after);
    }

    fn counts(&self) -> (usize, usize) {
        let running = self.sequences.iter().filter(|sequence| sequence.begun).count();
        (running, self.sequences.len() - running)
    }

    fn load(&self) -> rpc::LoadReport {
        let (running, waiting) = self.counts();
        let pending = |s: &Sequence| {
            if s.begun {
                s.prefill_left
            } else {
                s.request.prompt_ids.len()
            }
        };
        let small = |n: usize| u32::try_from(n).expect("small");
        rpc::LoadReport {
            seq: self.step,
            running: small(running),
            waiting: small(waiting),
            pending_prefill_tokens: small(self.sequences.iter().map(pending).sum()),
            ..Default::default()
        }
    }

    fn store(&mut self, keys: Vec<u64>) {
        let new: Vec<u64> = keys.into_iter().filter(|key| !self.cache.contains(key)).collect();
        if new.is_empty() {
            return;
        }
        self.cache.extend(&new);
        let over = self.cache.len().saturating_sub(self.config.n_blocks as usize);
        let removed: Vec<u64> = self.cache.drain(..over).collect();
        let skip = std::mem::take(&mut self.config.skip_kv_event);
        for session in &mut self.sessions {
            session.kv_seq += 1;
            if !skip {
                let (stored, removed, seq) = (new.clone(), removed.clone(), session.kv_seq);
                session.send(Frame::Kv(rpc::KvEvents {
                    seq,
                    snapshot: false,
                    stored,
                    removed,
                }));
            }
        }
    }

    fn to(&mut self, session: u64, send: impl FnOnce(&mut Outgoing)) {
        if let Some(session) = self.sessions.iter_mut().find(|of| of.id == session) {
            send(session);
        }
    }

    fn submit(&mut self, session: u64, request: rpc::Request, inner: &Inner) {
        let handle = request.handle;
        let key = (request.request_uuid.clone(), request.candidate, request.attempt);
        let fresh = self.known.insert(key);
        let mut overdrawn = false;
        self.to(session, |to| {
            to.credits -= 1;
            overdrawn = to.credits < 0;
        });
        inner.note(|seen| {
            seen.requests += 1;
            seen.duplicates += u64::from(!fresh);
            seen.overdrawn |= overdrawn;
            seen.most_handles = seen.most_handles.max(handle);
            seen.attempts.push(request.attempt);
        });
        let turned = match &mut self.config.turn_away {
            Some((left, reason, message)) if *left > 0 => {
                *left -= 1;
                Some((*reason, message.clone()))
            }
            _ if !fresh => Some((Reason::Rejected, "a repeated attempt".to_owned())),
            _ => None,
        };
        if let Some((reason, message)) = turned {
            let finished = rpc::Finished {
                handle,
                reason: reason.into(),
                output_tokens: 0,
                message,
                stop_token_id: None,
            };
            self.to(session, |to| {
                to.send(Frame::Step(rpc::StepOutput {
                    finished: vec![finished],
                    ..Default::default()
                }));
                to.credits += 1;
                to.send(Frame::Credit(rpc::Credit { add_submits: 1 }));
            });
            return;
        }
        let budget = request.budget.and_then(|budget| Duration::try_from(budget).ok());
        self.sequences.push_back(Sequence {
            session,
            deadline: budget.map(|budget| Instant::now() + budget),
            request,
            begun: false,
            prefill_left: 0,
            emitted: 0,
            cancelled: false,
        });
    }

    pub(super) fn take_in(&mut self, session: u64, frame: session_request::Frame, inner: &Inner) {
        match frame {
            session_request::Frame::Submit(submit) => {
                inner.note(|seen| seen.frames.push(submit.requests.len()));
                submit
                    .requests
                    .into_iter()
                    .for_each(|request| self.submit(session, request, inner));
                let waiting = self.counts().1;
                inner.note(|seen| seen.waiting = waiting);
            }
            session_request::Frame::Cancel(cancel) => {
                let now = Instant::now();
                for &handle in &cancel.handles {
                    inner.note(|seen| seen.cancels.push((handle, cancel.reason, now)));
                    let of = |s: &&mut Sequence| s.session == session && s.request.handle == handle;
                    if let Some(sequence) = self.sequences.iter_mut().find(of) {
                        sequence.cancelled = true;
                    }
                }
            }
            session_request::Frame::Window(window) => {
                assert!(self.config.windows, "a window for a worker that knows none");
                for (handle, tokens) in window.handle.into_iter().zip(window.output_tokens) {
                    let of = |s: &&mut Sequence| s.session == session && s.request.handle == handle;
                    if let Some(sequence) = self.sequences.iter_mut().find(of) {
                        let window = &mut sequence.request.window_tokens;
                        *window = (*window).max(tokens);
                    }
                }
            }
            session_request::Frame::Ping(ping) => {
                inner.note(|seen| seen.pings += 1);
                self.pongs.push((session, ping.nonce));
            }
            session_request::Frame::Goodbye(_) => {
                inner.note(|seen| seen.goodbyes += 1);
                self.leave(session);
            }
            session_request::Frame::Hello(_) => {}
        }
    }

    pub(super) fn leave(&mut self, session: u64) {
        self.sessions.retain(|of| of.id != session);
        self.sequences.retain(|sequence| sequence.session != session);
    }

    pub(super) fn welcome(&self) -> rpc::Welcome {
        let config = &self.config;
        let file = |(name, bytes): (&String, &Vec<u8>)| rpc::model_spec::File {
            name: name.clone(),
            digest: digest(bytes),
            size_bytes: bytes.len() as u64,
        };
        rpc::Welcome {
            protocol: config.protocol,
            replica_id: "mock".into(),
            boot_id: self.boot.to_vec(),
            model: Some(rpc::ModelSpec {
                served_names: config.served_names.clone(),
                max_model_len: 32_768,
                vocab_size: config.vocab_size,
                eos_token_ids: vec![2],
                files: config.files.iter().map(file).collect(),
            }),
            capacity: Some(rpc::Capacity {
                tensor_parallel: 1,
                max_running: config.max_running,
                max_step_tokens: u32::try_from(config.step_tokens).expect("small"),
                block_tokens: config.block_tokens,
                n_blocks: config.n_blocks,
                prefill_tokens_per_second: config.prefill_tokens_per_second,
            }),
            submit_credits: config.credits,
            windows: config.windows,
        }
    }
}

fn push_score(frame: &mut rpc::StepOutput, handle: u32, position: u32, id: u32, top: Option<u32>) {
    let columns = frame.logprobs.get_or_insert_default();
    columns.handle.push(handle);
    columns.position.push(position);
    columns.token_id.push(id);
    columns.logprob.push(logprob(id));
    columns.rank.push(id % 5 + 1);
    let n = top.unwrap_or(0);
    columns.top_n.push(n);
    columns.top_ids.extend(0..n);
    columns.top_logprobs.extend((0..n).map(|i| -(i as f32)));
}
