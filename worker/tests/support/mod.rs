//! What the tests of the group share: models, and a loop of scheduler and group without sockets.

#![allow(dead_code, reason = "each test binary uses a part")]

pub mod goldens;
pub mod random_model;

use std::{
    collections::{BTreeMap, VecDeque},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use swallow_schedule::{Ask, Finish, Limits, Micros, Output, Scheduler, SeqId};
use swallow_worker::{
    checkpoint::Checkpoint,
    device::cuda::{Options, Products},
    group::{Group, GroupSpec, LoadProgress, Machine},
    sampling::{SamplingParams, TokenScore},
};

/// A committed fixture.
pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/fixtures")
        .join(name)
}

/// A group of this many ranks, small enough for a test.
pub fn spec(tensor_parallel: usize) -> GroupSpec {
    GroupSpec {
        machine: Machine::Cpu,
        tensor_parallel,
        rank_alone: false,
        threads: 2,
        block_tokens: 16,
        n_blocks: 512,
        max_running: 16,
        max_step_tokens: 512,
        max_model_len: 4096,
        step_timeout: Duration::from_secs(120),
        steps_ahead: 1,
        gpu: Options {
            products: Products::First,
            ..Options::default()
        },
        random_kv: false,
        fault: None,
    }
}

pub fn checkpoint(dir: &Path, tensor_parallel: usize) -> Arc<Checkpoint> {
    Arc::new(Checkpoint::open(dir, tensor_parallel).unwrap_or_else(|e| panic!("{}: {e}", dir.display())))
}

pub fn start(dir: &Path, spec: GroupSpec) -> Group {
    let checkpoint = checkpoint(dir, spec.tensor_parallel);
    Group::start(checkpoint, spec, Arc::new(LoadProgress::default())).unwrap_or_else(|e| panic!("{e}"))
}

/// One sequence to generate.
#[derive(Clone)]
pub struct Request {
    pub prompt: Vec<u32>,
    pub max_tokens: u32,
    pub params: SamplingParams,
}

impl Request {
    pub fn greedy(prompt: &[u32], max_tokens: u32) -> Self {
        Self {
            prompt: prompt.to_vec(),
            max_tokens,
            params: SamplingParams::greedy(),
        }
    }
}

/// What came of it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    pub tokens: Vec<u32>,
    pub scores: Vec<TokenScore>,
    /// From position 1 on.
    pub prompt_scores: Vec<TokenScore>,
    pub cached_tokens: u32,
    pub finish: Option<Finish>,
}

/// A scheduler and a group, which runs as many steps ahead as its spec says.
pub struct Engine {
    pub scheduler: Scheduler,
    pub group: Group,
    spec: GroupSpec,
    next: u64,
    /// Most blocks held at once since the start.
    pub most_blocks: u32,
    pub steps: u64,
}

impl Engine {
    pub fn start(dir: &Path, spec: GroupSpec) -> Self {
        Self::start_with(dir, spec, true)
    }

    pub fn start_with(dir: &Path, spec: GroupSpec, prefix_cache: bool) -> Self {
        let group = start(dir, spec.clone());
        Self::of(group, spec, prefix_cache)
    }

    /// On a group that runs already.
    pub fn of(group: Group, spec: GroupSpec, prefix_cache: bool) -> Self {
        let scheduler = scheduler(&spec, prefix_cache);
        Self {
            scheduler,
            group,
            spec,
            next: 1,
            most_blocks: 0,
            steps: 0,
        }
    }

    /// A new scheduler, so that steps have at most this many rows and nothing is cached.
    pub fn reset(&mut self, max_step_tokens: usize, prefix_cache: bool) {
        self.scheduler = scheduler(
            &GroupSpec {
                max_step_tokens,
                ..self.spec.clone()
            },
            prefix_cache,
        );
    }

    /// Runs all requests together; `stagger` steps lie between one arrival and the next.
    pub fn run(&mut self, requests: &[Request], stagger: u64) -> Vec<Outcome> {
        let first = self.next;
        let mut outcomes: BTreeMap<SeqId, Outcome> = BTreeMap::new();
        let mut arrivals = requests.iter();
        let (mut n_steps, mut flights) = (0, VecDeque::new());
        loop {
            while n_steps >= stagger * (self.next - first) || self.scheduler.is_idle() {
                let Some(request) = arrivals.next() else { break };
                let seq = self.add(request);
                outcomes.insert(seq, Outcome::default());
            }
            let step = self.scheduler.step(Micros(n_steps));
            let idle = step.is_none();
            if let Some(step) = step {
                self.most_blocks = self.most_blocks.max(self.scheduler.load().blocks_held);
                self.group.launch(&step).unwrap_or_else(|e| panic!("{e}"));
                flights.push_back(step.id);
                n_steps += 1;
                self.steps += 1;
            }
            if flights.len() < self.group.steps_ahead() && !idle {
                continue;
            }
            let Some(step) = flights.pop_front() else {
                assert!(self.scheduler.is_idle(), "work is left but no step comes");
                break;
            };
            let result = self.group.finish().unwrap_or_else(|e| panic!("{e}"));
            self.scheduler.commit(step, &result.tokens());
            for sampled in result.sampled {
                // A sequence that had ended when the step was launched is computed once too often.
                let outcome = outcomes.get_mut(&sampled.seq).expect("asked");
                if outcome.finish.is_none() {
                    outcome.scores.extend(sampled.score);
                }
            }
            for scores in result.prompt_scores {
                let outcome = outcomes.get_mut(&scores.seq).expect("asked");
                outcome.prompt_scores.truncate(scores.first_position as usize - 1);
                outcome.prompt_scores.extend(scores.scores);
            }
            self.record(&mut outcomes);
        }
        assert_eq!(
            self.scheduler.load().blocks_held,
            0,
            "all blocks are free at the end"
        );
        outcomes.into_values().collect()
    }

    fn add(&mut self, request: &Request) -> SeqId {
        let (id, prompt) = (SeqId(self.next), Arc::<[u32]>::from(&request.prompt[..]));
        self.next += 1;
        self.group.admit(id, request.params.clone(), prompt.clone());
        let ask = Ask {
            id,
            prompt,
            max_tokens: request.max_tokens,
            min_tokens: request.params.min_tokens,
            stop_ids: request.params.stop_ids.clone(),
            root_key: swallow_proto::prefix::root(0),
            prompt_logprobs: request.params.prompt_logprobs.is_some(),
            prompt_logprobs_from: 0,
            deadline: None,
        };
        self.scheduler.add(ask).unwrap_or_else(|e| panic!("{e}"));
        if request.params.grammar.is_some() {
            self.scheduler.keep_in_step(id);
        }
        id
    }

    fn record(&mut self, outcomes: &mut BTreeMap<SeqId, Outcome>) {
        for output in self.scheduler.take_outputs() {
            match output {
                Output::Started { seq, cached_tokens } => {
                    outcomes.get_mut(&seq).expect("asked").cached_tokens = cached_tokens;
                }
                Output::Token { seq, index, token } => {
                    let tokens = &mut outcomes.get_mut(&seq).expect("asked").tokens;
                    assert_eq!(tokens.len(), index as usize);
                    tokens.push(token);
                }
                Output::Finished { seq, why, n_tokens } => {
                    let outcome = outcomes.get_mut(&seq).expect("asked");
                    assert_eq!(outcome.tokens.len(), n_tokens as usize);
                    outcome.finish = Some(why);
                    self.group.retire(seq);
                }
            }
        }
    }
}

fn scheduler(spec: &GroupSpec, prefix_cache: bool) -> Scheduler {
    Scheduler::new(Limits {
        block_tokens: spec.block_tokens as u32,
        n_blocks: spec.n_blocks as u32,
        max_running: spec.max_running as u32,
        max_step_tokens: spec.max_step_tokens as u32,
        max_model_len: spec.max_model_len as u32,
        max_waiting: 1024,
        prefix_cache,
        key_of: swallow_proto::prefix::next,
    })
}
