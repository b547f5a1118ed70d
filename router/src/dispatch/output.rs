//! What one attempt at a request has brought, and its client has not read: events in order, nothing before its time.
//!
//! Nothing is shown before candidate 0 has begun and the prompt's scores are whole, because they come first. A client
//! that is behind gets its tokens in larger pieces.

use std::collections::VecDeque;

use crate::ask::{Ask, Event, Finish, Score};

#[derive(Debug)]
pub(super) struct Output {
    /// Of candidate 0, once it has begun.
    cached_tokens: Option<u32>,
    prompt_scores: Option<PromptScores>,
    events: VecDeque<Event>,
    buffered_tokens: usize,
    /// Candidates of which more may come.
    open: Vec<bool>,
}

#[derive(Debug)]
struct PromptScores {
    /// The position of the first of them.
    from: usize,
    scores: Vec<Option<Score>>,
    missing: usize,
}

impl Output {
    pub fn new(ask: &Ask) -> Self {
        let from = ask.prompt_logprobs_from as usize;
        let positions = ask.prompt.len() - from;
        let nothing = || PromptScores {
            from,
            scores: vec![None; positions],
            missing: positions,
        };
        Self {
            cached_tokens: None,
            prompt_scores: ask.prompt_logprobs.map(|_| nothing()),
            events: VecDeque::new(),
            buffered_tokens: 0,
            open: vec![true; ask.candidates as usize],
        }
    }

    /// More may come of this candidate.
    pub fn is_open(&self, candidate: u32) -> bool {
        self.open.get(candidate as usize).is_some_and(|open| *open)
    }

    /// More may come.
    pub fn is_running(&self) -> bool {
        self.open.contains(&true)
    }

    /// Tokens that wait.
    pub fn buffered_tokens(&self) -> usize {
        self.buffered_tokens
    }

    pub fn push_begun(&mut self, candidate: u32, cached_tokens: u32) {
        if candidate == 0 {
            self.cached_tokens = Some(cached_tokens);
        }
    }

    /// The score of a prompt position, 1 or more. A preempted prompt is computed again and may be scored again: the
    /// first word stands.
    pub fn push_prompt_score(&mut self, position: u32, score: Score) {
        let Some(PromptScores {
            from,
            scores,
            missing,
        }) = &mut self.prompt_scores
        else {
            return;
        };
        let place = (position as usize)
            .checked_sub(*from)
            .and_then(|index| scores.get_mut(index));
        if let Some(empty @ None) = place {
            *empty = Some(score);
            *missing -= 1;
        }
    }

    pub fn push_tokens(&mut self, candidate: u32, new: &[u32], new_scores: Vec<Score>) {
        self.buffered_tokens += new.len();
        if let Some(Event::Tokens {
            candidate: last,
            tokens,
            scores,
        }) = self.events.back_mut()
            && *last == candidate
        {
            tokens.extend_from_slice(new);
            scores.extend(new_scores);
            return;
        }
        self.events.push_back(Event::Tokens {
            candidate,
            tokens: new.to_vec(),
            scores: new_scores,
        });
    }

    pub fn push_finished(&mut self, candidate: u32, why: Finish) {
        self.open[candidate as usize] = false;
        self.events.push_back(Event::Finished { candidate, why });
    }

    /// Nothing more is wanted of a candidate, and what waits of it is dropped. True: more could have come.
    pub fn stop(&mut self, candidate: u32) -> bool {
        let of = |event: &Event| match event {
            Event::Tokens {
                candidate, tokens, ..
            } => Some((*candidate, tokens.len())),
            Event::Finished { candidate, .. } => Some((*candidate, 0)),
            Event::Started { .. } | Event::PromptScores(_) => None,
        };
        self.events.retain(|event| match of(event) {
            Some((whose, tokens)) if whose == candidate => {
                self.buffered_tokens -= tokens;
                false
            }
            _ => true,
        });
        self.open
            .get_mut(candidate as usize)
            .is_some_and(|open| std::mem::replace(open, false))
    }

    /// What the client reads first, once there is something to follow it: until then it can start over elsewhere.
    pub fn start(&mut self) -> Option<Event> {
        let cached_tokens = self.cached_tokens?;
        match self.prompt_scores.take_if(|scores| scores.missing == 0) {
            Some(PromptScores { scores, .. }) => {
                let scores = scores
                    .into_iter()
                    .map(|score| score.expect("none is missing"))
                    .collect();
                self.events.push_front(Event::PromptScores(scores));
            }
            None if self.prompt_scores.is_some() || self.events.is_empty() => return None,
            None => {}
        }
        Some(Event::Started { cached_tokens })
    }

    /// What the client reads next.
    pub fn pop(&mut self) -> Option<Event> {
        let event = self.events.pop_front();
        if let Some(Event::Tokens { tokens, .. }) = &event {
            self.buffered_tokens -= tokens.len();
        }
        event
    }

    /// What waits is dropped.
    pub fn clear(&mut self) {
        self.events = VecDeque::new();
        self.buffered_tokens = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ask::Sampling;

    fn ask(prompt_logprobs: Option<u32>) -> Ask {
        Ask {
            model: "m".into(),
            uuid: uuid::Uuid::nil(),
            prompt: [1, 2, 3].into(),
            candidates: 2,
            sampling: Sampling::default(),
            max_tokens: 9,
            min_tokens: 0,
            stop_token_ids: vec![],
            ignore_eos: false,
            grammar: None,
            logprobs: None,
            prompt_logprobs,
            prompt_logprobs_from: 1,
            text_bytes: 0,
            cache_salt: 0,
            share: Default::default(),
            deadline: None,
            max_queue_wait: None,
        }
    }

    fn tokens(candidate: u32, tokens: &[u32]) -> Event {
        Event::Tokens {
            candidate,
            tokens: tokens.to_vec(),
            scores: vec![],
        }
    }

    #[test]
    fn nothing_is_shown_before_candidate_0_and_the_scores() {
        let mut output = Output::new(&ask(Some(0)));
        let score = |token| Score {
            token,
            logprob: 0.0,
            rank: 1,
            top: vec![],
        };
        output.push_begun(1, 7);
        output.push_tokens(1, &[9], vec![]);
        assert_eq!(output.start(), None, "candidate 0 has not begun");
        output.push_begun(0, 16);
        output.push_prompt_score(2, score(3));
        assert_eq!(output.start(), None, "position 1 has no score");
        output.push_prompt_score(2, score(99));
        output.push_prompt_score(0, score(99));
        output.push_prompt_score(3, score(99));
        output.push_prompt_score(1, score(2));
        assert_eq!(output.start(), Some(Event::Started { cached_tokens: 16 }));
        assert_eq!(output.pop(), Some(Event::PromptScores(vec![score(2), score(3)])));
        assert_eq!(output.pop(), Some(tokens(1, &[9])));
    }

    #[test]
    fn tokens_gather_while_nobody_reads() {
        let mut output = Output::new(&ask(None));
        output.push_begun(0, 0);
        assert_eq!(output.start(), None, "it can still start over");
        for (candidate, new) in [(0, [1, 2]), (0, [3, 4]), (1, [5, 6]), (0, [7, 8])] {
            output.push_tokens(candidate, &new, vec![]);
        }
        assert_eq!(output.buffered_tokens(), 8);
        assert!(output.start().is_some());
        assert_eq!(output.pop(), Some(tokens(0, &[1, 2, 3, 4])));
        output.push_finished(0, Finish::Length);
        assert!(output.stop(1) && !output.stop(1) && !output.stop(5));
        assert_eq!(output.buffered_tokens(), 2);
        assert_eq!(output.pop(), Some(tokens(0, &[7, 8])));
        assert_eq!(
            output.pop(),
            Some(Event::Finished {
                candidate: 0,
                why: Finish::Length
            })
        );
        assert_eq!(output.pop(), None);
        assert!(!output.is_running());
    }
}
