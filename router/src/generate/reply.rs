//! A running request as its client reads it: events of token ids come in, pieces of text go out.
//!
//! A token that may be the stop token waits for the event after it, which says whether it was; nothing else waits but
//! what `text::Transcript` withholds.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant as Clock},
};

use futures::StreamExt;
use tokio::time::Instant;
use uuid::Uuid;

use super::{
    Ends, Fault, Prepared,
    memory::{Gathered, written},
};
use crate::{
    ask::{Event, Failure, Finish, Score},
    engine::Run,
    fleet::ModelEntry,
    metrics::{Metrics, Stage, TokenMeter},
    models::ModelText,
    text::Transcript,
};

/// A token of the output.
#[derive(Clone, Debug, PartialEq)]
pub struct Spoken {
    /// Its id.
    pub token: u32,
    /// Its score, if asked for.
    pub score: Option<Score>,
    /// Where its text begins, in characters from the output's beginning.
    pub offset: u32,
}

/// Why a candidate ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// By the model's end-of-sequence token.
    Eos(u32),
    /// By a stop id of the request.
    StopToken(u32),
    /// By a stop string of the request.
    StopString(String),
    /// By its length.
    Length,
}

/// What the client reads, in order.
#[derive(Clone, Debug, PartialEq)]
pub enum Piece {
    /// First of all.
    Started {
        /// Prompt tokens that were not computed.
        cached_tokens: u32,
    },
    /// Scores of the prompt positions that were asked for.
    PromptScores(Vec<Score>),
    /// More of a candidate.
    Delta {
        /// Which.
        candidate: u32,
        /// Whole code points; may be empty.
        text: String,
        /// What came; may be empty where withheld text comes free.
        tokens: Vec<Spoken>,
    },
    /// A candidate's end.
    Finished {
        /// Which.
        candidate: u32,
        /// Why.
        end: End,
    },
}

/// What a request took.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Usage {
    /// Of the prompt, once.
    pub prompt_tokens: u32,
    /// Of these, found in a cache.
    pub cached_tokens: u32,
    /// Of all candidates.
    pub output_tokens: u32,
    /// Until a replica accepted it.
    pub queue_time: Duration,
    /// From its arrival; `None` without output.
    pub time_to_first_token: Option<Duration>,
}

/// One candidate.
struct Voice {
    transcript: Transcript,
    /// The last token, while it may be the stop token.
    held: Option<(u32, Option<Score>)>,
    last_tokens: Option<Clock>,
    over: bool,
}

/// A running request. Dropping it cancels the request.
pub struct Reply {
    run: Box<dyn Run>,
    /// As workers log it.
    uuid: Uuid,
    /// The model.
    pub entry: Arc<ModelEntry>,
    /// Its text side.
    pub text: Arc<ModelText>,
    /// The prompt's ids.
    pub prompt: Arc<[u32]>,
    ends: Ends,
    stop_strings: Arc<crate::text::Wording>,
    voices: Vec<Voice>,
    ready: VecDeque<Piece>,
    deadline: Option<Instant>,
    arrived: Clock,
    usage: Usage,
    metrics: Arc<Metrics>,
    meter: TokenMeter,
    detokenizing: Duration,
}

/// One whole candidate.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// Its text.
    pub text: String,
    /// Its tokens.
    pub tokens: Vec<Spoken>,
    /// Why it ended.
    pub end: End,
}

impl Reply {
    pub(super) fn new(
        run: Box<dyn Run>,
        prepared: Prepared,
        queue_time: Duration,
        metrics: &Arc<Metrics>,
    ) -> Self {
        let Prepared {
            ask,
            entry,
            text,
            wording,
            ends,
            arrived,
        } = prepared;
        let voice = || Voice {
            transcript: Transcript::new(Arc::clone(&text.tokenizer), Arc::clone(&wording)),
            held: None,
            last_tokens: None,
            over: false,
        };
        Self {
            voices: (0..ask.candidates).map(|_| voice()).collect(),
            usage: Usage {
                prompt_tokens: ask.prompt.len() as u32,
                queue_time,
                ..Usage::default()
            },
            meter: metrics.tokens(&entry.name, ask.share.name.as_ref()),
            run,
            uuid: ask.uuid,
            entry,
            prompt: ask.prompt,
            ends,
            stop_strings: wording,
            ready: VecDeque::new(),
            deadline: ask.deadline,
            arrived,
            metrics: Arc::clone(metrics),
            detokenizing: Duration::ZERO,
            text,
        }
    }

    /// What it took so far.
    pub fn usage(&self) -> Usage {
        self.usage
    }

    /// How many candidates it has.
    pub fn candidates(&self) -> usize {
        self.voices.len()
    }

    /// The next piece; `None` after the last candidate's end.
    pub async fn next(&mut self) -> Result<Option<Piece>, Fault> {
        let next = self.piece().await;
        if let Err(fault) = &next {
            tracing::warn!(request = %self.uuid, model = self.entry.name, %fault, "a started request failed");
        }
        next
    }

    async fn piece(&mut self) -> Result<Option<Piece>, Fault> {
        loop {
            if let Some(piece) = self.ready.pop_front() {
                return Ok(Some(piece));
            }
            if self.voices.iter().all(|voice| voice.over) {
                return Ok(None);
            }
            let event = match self.deadline {
                None => self.run.next().await,
                Some(at) => {
                    tokio::time::timeout_at(at, self.run.next())
                        .await
                        .map_err(|_| Failure::Deadline {
                            tokens: self.usage.output_tokens,
                        })?
                }
            };
            let Some(event) = event else {
                return Err(
                    Failure::Worker("its answer ended before its last candidate did".to_owned()).into(),
                );
            };
            let event = event?;
            let started = Clock::now();
            self.read(event);
            self.detokenizing += started.elapsed();
        }
    }

    /// All of it: the prompt's scores, and the candidates in order. It counts as a part of what is `gathered`.
    pub async fn collect(mut self, gathered: &Gathered) -> Result<(Vec<Score>, Vec<Answer>, Usage), Fault> {
        let mut scores = Vec::new();
        let mut answers: Vec<Answer> = self
            .voices
            .iter()
            .map(|_| Answer {
                text: String::new(),
                tokens: Vec::new(),
                end: End::Length,
            })
            .collect();
        while let Some(piece) = self.next().await? {
            match piece {
                Piece::Started { .. } => {}
                Piece::PromptScores(all) => {
                    gathered.take(all.iter().map(|score| written(Some(score))).sum())?;
                    scores = all;
                }
                Piece::Delta {
                    candidate,
                    text,
                    tokens,
                } => {
                    let of_tokens = tokens.iter().map(|token| written(token.score.as_ref()));
                    gathered.take(text.len() + of_tokens.sum::<usize>())?;
                    let answer = &mut answers[candidate as usize];
                    answer.text.push_str(&text);
                    answer.tokens.extend(tokens);
                }
                Piece::Finished { candidate, end } => answers[candidate as usize].end = end,
            }
        }
        Ok((scores, answers, self.usage))
    }

    fn read(&mut self, event: Event) {
        match event {
            Event::Started { cached_tokens } => {
                self.usage.cached_tokens = cached_tokens;
                self.metrics
                    .prompt(&self.entry.name, self.prompt.len(), cached_tokens);
                self.meter.prompt(self.prompt.len());
                self.ready.push_back(Piece::Started { cached_tokens });
            }
            Event::PromptScores(scores) => self.ready.push_back(Piece::PromptScores(scores)),
            Event::Tokens {
                candidate,
                tokens,
                scores,
            } => self.read_tokens(candidate, tokens, scores),
            Event::Finished { candidate, why } => self.read_finished(candidate, why),
        }
    }

    fn read_tokens(&mut self, candidate: u32, tokens: Vec<u32>, scores: Vec<Score>) {
        let Some(voice) = self
            .voices
            .get_mut(candidate as usize)
            .filter(|voice| !voice.over)
        else {
            return;
        };
        let now = Clock::now();
        if self.usage.time_to_first_token.is_none() {
            let after = now - self.arrived;
            self.usage.time_to_first_token = Some(after);
            self.meter.first(after);
        }
        self.meter
            .tokens(tokens.len(), voice.last_tokens.map(|last| now - last));
        voice.last_tokens = Some(now);
        let mut scores = scores.into_iter().map(Some).chain(std::iter::repeat(None));
        let mut arrived: Vec<(u32, Option<Score>)> = voice.held.take().into_iter().collect();
        arrived.extend(tokens.into_iter().map(|token| (token, scores.next().flatten())));
        if let Some(last) = arrived.pop_if(|(token, _)| self.ends.any.contains(token)) {
            voice.held = Some(last);
        }
        let (mut text, mut spoken) = (String::new(), Vec::with_capacity(arrived.len()));
        let mut stop = None;
        for (token, score) in arrived {
            let shown = voice.transcript.push(token, &mut text);
            spoken.push(Spoken {
                token,
                score,
                offset: shown.offset,
            });
            stop = shown.stop;
            if stop.is_some() {
                break;
            }
        }
        self.usage.output_tokens += spoken.len() as u32;
        self.say(candidate, text, spoken);
        if let Some(which) = stop {
            self.run.stop(candidate);
            let string = self.stop_strings.stops.strings()[which].clone();
            self.finish(candidate, End::StopString(string));
        }
    }

    fn read_finished(&mut self, candidate: u32, why: Finish) {
        let Some(voice) = self
            .voices
            .get_mut(candidate as usize)
            .filter(|voice| !voice.over)
        else {
            return;
        };
        let (mut text, mut spoken, mut stop) = (String::new(), Vec::new(), None);
        let stopped_by = match why {
            Finish::Eos(id) | Finish::StopToken(id) => Some(id),
            Finish::Length => None,
        };
        if let Some((token, score)) = voice.held.take() {
            let named =
                self.ends.named.contains(&token) || self.ends.texts.iter().any(|(id, _)| *id == token);
            let shown = if stopped_by == Some(token) {
                voice.transcript.stop_token(token, named, &mut text)
            } else {
                voice.transcript.push(token, &mut text)
            };
            spoken.push(Spoken {
                token,
                score,
                offset: shown.offset,
            });
            stop = shown.stop;
        }
        if stop.is_none() {
            stop = voice.transcript.finish(&mut text);
        }
        let end = match (stop, why) {
            (Some(which), _) => End::StopString(self.stop_strings.stops.strings()[which].clone()),
            (None, Finish::Length) => End::Length,
            (None, Finish::Eos(id) | Finish::StopToken(id)) => self.end_by_token(id, why),
        };
        self.usage.output_tokens += spoken.len() as u32;
        self.say(candidate, text, spoken);
        self.finish(candidate, end);
    }

    /// What the client asked for comes before what the model would have done anyway.
    fn end_by_token(&self, id: u32, why: Finish) -> End {
        if let Some((_, string)) = self.ends.texts.iter().find(|(special, _)| *special == id) {
            End::StopString(string.clone())
        } else if self.ends.named.contains(&id) || matches!(why, Finish::StopToken(_)) {
            End::StopToken(id)
        } else {
            End::Eos(id)
        }
    }

    fn say(&mut self, candidate: u32, text: String, tokens: Vec<Spoken>) {
        if !text.is_empty() || !tokens.is_empty() {
            self.ready.push_back(Piece::Delta {
                candidate,
                text,
                tokens,
            });
        }
    }

    fn finish(&mut self, candidate: u32, end: End) {
        self.voices[candidate as usize].over = true;
        self.ready.push_back(Piece::Finished { candidate, end });
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        self.metrics.stage(Stage::Detokenize, self.detokenizing);
    }
}
