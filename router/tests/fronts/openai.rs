//! OpenAI's HTTP interface over real sockets, before an engine that says what the test wants.

mod additions;
mod answers;
mod ends;
mod errors;
mod pages;
mod stops;
mod tools;
mod waiting;

use std::time::Duration;

use crate::support::{
    BOS, EOS, EOT,
    engine::{
        ABSENT, CONTEXT, MAX_BODY, finished, says, start, start_set, start_with_template, started,
        then_hangs, tokens,
    },
    http::{get, post, receive, send},
};
use futures::{StreamExt, stream};
use serde_json::{Value, json};
use swallow_router::{
    ask::{Event, Failure, Finish, Refusal},
    openai::Settings,
};
use tokio::io::AsyncReadExt;

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

fn user(content: &str) -> Value {
    json!([{"role": "user", "content": content}])
}

fn ids(text: &str) -> Vec<u32> {
    text.bytes().map(u32::from).collect()
}
