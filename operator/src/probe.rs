//! Questions to processes over their HTTP ports, asked aside so that a silent process holds up nothing.

use std::{net::SocketAddr, time::Duration};

use serde_json::Value;
use tokio::task::JoinSet;

/// How long an answer may take.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);
/// The most bytes of an answer.
const ANSWER_MAX: u64 = 1 << 20;

/// Whom a question is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Whom {
    /// A group, by its uid.
    Group(String),
    /// The router.
    Router,
}

/// What came back; `None` when nothing did, or nothing that could be read.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// Who was asked.
    pub whom: Whom,
    /// The body of a 200, as JSON.
    pub body: Option<Value>,
}

/// Open questions, at most one for each process.
#[derive(Debug, Default)]
pub struct Probes {
    open: Vec<Whom>,
    tasks: JoinSet<Answer>,
}

impl Probes {
    /// Asks, unless the last question to the same process is still open.
    pub fn ask(&mut self, whom: Whom, address: SocketAddr, path: &'static str) {
        if self.open.contains(&whom) {
            return;
        }
        self.open.push(whom.clone());
        self.tasks.spawn_blocking(move || Answer {
            whom,
            body: get(address, path),
        });
    }

    /// The next answer; waits for ever when no question is open.
    pub async fn next(&mut self) -> Option<Answer> {
        let Some(outcome) = self.tasks.join_next().await else {
            return std::future::pending().await;
        };
        let answer = outcome.expect("a question neither panics nor is cancelled");
        self.open.retain(|whom| *whom != answer.whom);
        Some(answer)
    }
}

fn get(address: SocketAddr, path: &str) -> Option<Value> {
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .timeout_global(Some(ANSWER_WITHIN))
        .proxy(None)
        .build()
        .into();
    let mut response = agent.get(format!("http://{address}{path}")).call().ok()?;
    let text = response
        .body_mut()
        .with_config()
        .limit(ANSWER_MAX)
        .read_to_string()
        .ok()?;
    serde_json::from_str(&text).ok()
}
