//! One path for both fronts: a parsed request becomes an `Ask`, the events that come back become text.
//!
//! gRPC and HTTP differ only in how they write what passes here, so the same request has the same answer on both.
//! The client's deadline binds all of it: tokenising, waiting and every event of the answer.

mod fault;
mod reply;
mod request;

use std::{
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant as Clock},
};

use tokio::{sync::Semaphore, time::Instant};
use uuid::Uuid;

pub use fault::{BAD_VALUE, Fault, Invalid, PROMPT_TOO_LONG, UNSUPPORTED};
pub use reply::{Answer, End, Piece, Reply, Spoken, Usage};
pub use request::{Chat, Input, MAX_CANDIDATES, MAX_TOP, Request, Stop, Unasked};

use crate::{
    ask::{Ask, Refusal},
    engine::Engine,
    fleet::ModelEntry,
    metrics::{Metrics, Stage},
    models::{Library, ModelText},
    template::{Conversation, TemplateError, end_of_last},
    text::{StopSet, Wording},
};

/// Texts up to this size are tokenised where they are: handing them over costs more. About 0.2 ms, of our own tokenizer
/// and of the library's.
const INLINE_BYTES: usize = 16 << 10;
const INLINE_LIBRARY_BYTES: usize = 1 << 10;
/// A request waits so long for the first replica of its model to tell what the model is made of: longer than the
/// longest pause between two attempts to reach one.
const FIRST_REPLICA: Duration = Duration::from_secs(5);
/// A model whose files are not here even then is asked for again after this.
const FILES_SOON: Duration = Duration::from_secs(2);
/// So many do: there is no other bound on what they hold.
const EARLY_REQUESTS: usize = 1024;

/// Where requests enter. Cheap to clone.
#[derive(Clone)]
pub struct Door(Arc<Inner>);

struct Inner {
    engine: Arc<dyn Engine>,
    library: Library,
    metrics: Arc<Metrics>,
    /// Texts that are tokenised at once: as many as there are cores.
    encoders: Arc<Semaphore>,
    /// Places to wait for a model's first replica.
    early: Semaphore,
    leaving: AtomicBool,
    draining: AtomicBool,
}

/// A request that met its model: everything about it is sound.
pub struct Prepared {
    ask: Ask,
    /// The model.
    pub entry: Arc<ModelEntry>,
    /// Its text side.
    pub text: Arc<ModelText>,
    wording: Arc<Wording>,
    ends: Ends,
    arrived: Clock,
}

/// What may end a candidate by its id.
#[derive(Clone, Debug)]
struct Ends {
    /// Every id that a replica may report as the end.
    any: Vec<u32>,
    /// Named by the request.
    named: Vec<u32>,
    /// Named by the request as a text.
    texts: Vec<(u32, String)>,
}

impl Prepared {
    /// The prompt's ids.
    pub fn prompt(&self) -> &Arc<[u32]> {
        &self.ask.prompt
    }
}

impl Door {
    /// A door before `engine`.
    pub fn new(engine: Arc<dyn Engine>, metrics: Arc<Metrics>) -> Self {
        let cores = std::thread::available_parallelism().map_or(2, usize::from);
        Self(Arc::new(Inner {
            engine,
            library: Library::default(),
            metrics,
            encoders: Arc::new(Semaphore::new(cores)),
            early: Semaphore::new(EARLY_REQUESTS),
            leaving: AtomicBool::new(false),
            draining: AtomicBool::new(false),
        }))
    }

    /// All models.
    pub fn models(&self) -> Vec<Arc<ModelEntry>> {
        self.0.engine.models()
    }

    /// The counters.
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.0.metrics
    }

    /// Whether this router is one to send requests to: it has looked for replicas, and is not about to end. How many
    /// it found does not matter; without any it answers with when to come again.
    pub fn is_ready(&self) -> bool {
        !self.is_leaving() && self.0.engine.is_settled()
    }

    /// Readiness is false from now on, while requests are still served: whoever sends them here has to hear of it
    /// first.
    pub fn leave(&self) {
        self.0.leaving.store(true, Ordering::Release);
    }

    /// Whether `leave` or `drain` was called.
    pub fn is_leaving(&self) -> bool {
        self.0.leaving.load(Ordering::Acquire)
    }

    /// No new requests from now on.
    pub fn drain(&self) {
        self.leave();
        self.0.draining.store(true, Ordering::Release);
    }

    /// Whether `drain` was called.
    pub fn is_draining(&self) -> bool {
        self.0.draining.load(Ordering::Acquire)
    }

    /// The model of that name, bare or as "models/NAME"; the only one there is, where no name is given.
    pub fn model(&self, name: &str) -> Result<Arc<ModelEntry>, Fault> {
        if name.is_empty() {
            let mut models = self.models();
            return match (models.pop(), models.pop()) {
                (Some(only), None) => Ok(only),
                _ => Err(Invalid::new("model", "is missing; name one of the served models").into()),
            };
        }
        let find = |name: &str| self.0.engine.model(name);
        let found = find(name).or_else(|| find(name.strip_prefix("models/")?));
        found.ok_or_else(|| Refusal::UnknownModel(name.to_owned()).into())
    }

    /// As `model`, with its files. A replica is ready for others a moment before it has told the router what it serves:
    /// the model's first requests wait for that.
    ///
    /// # Errors
    /// No such model; or no replica has come in time, or too many requests wait for one.
    pub async fn known(&self, name: &str) -> Result<Arc<ModelEntry>, Fault> {
        let entry = self.model(name)?;
        if entry.files.is_some() {
            return Ok(entry);
        }
        let Ok(_place) = self.0.early.try_acquire() else {
            return Err(no_files(&entry));
        };
        let mut changes = self.0.engine.changes();
        let files = async {
            loop {
                let entry = self.model(name)?;
                if entry.files.is_some() {
                    return Ok(entry);
                }
                if changes.changed().await.is_err() {
                    return Err(no_files(&entry));
                }
            }
        };
        let in_time = tokio::time::timeout(FIRST_REPLICA, files).await;
        in_time.unwrap_or_else(|_late| Err(no_files(&entry)))
    }

    /// The model's text side, read now if need be.
    pub async fn text(&self, entry: &ModelEntry) -> Result<Arc<ModelText>, Fault> {
        let Some(files) = &entry.files else {
            return Err(no_files(entry));
        };
        let text = self.0.library.text(&entry.name, files, || self.models()).await;
        text.map_err(|error| Fault::Model {
            model: entry.name.clone(),
            why: error.to_string(),
        })
    }

    /// From a parsed request to a sound one.
    pub async fn prepare(&self, mut request: Request) -> Result<Prepared, Fault> {
        let arrived = Clock::now();
        if self.is_draining() {
            return Err(Refusal::ShuttingDown.into());
        }
        // Nobody waits to be told of these.
        self.model(&request.model)?;
        request.check()?;
        let deadline = request.deadline;
        in_time(deadline, async {
            let entry = self.known(&request.model).await?;
            let text = self.text(&entry).await?;
            let input = std::mem::replace(&mut request.input, Input::Tokens(Vec::new()));
            let prompt = self.tokens(&entry, &text, input).await?;
            prepared(request, entry, text, prompt, arrived)
        })
        .await
    }

    /// Waits for a replica; resolves when one has accepted the request.
    pub async fn start(&self, prepared: Prepared) -> Result<Reply, Fault> {
        let called = Clock::now();
        let deadline = prepared.ask.deadline;
        let started = self.0.engine.generate(prepared.ask.clone());
        let run = in_time(deadline, async { Ok(started.await?) }).await?;
        Ok(Reply::new(run, prepared, called.elapsed(), &self.0.metrics))
    }

    /// The ids of a prompt, checked against the vocabulary; there may be none.
    pub async fn tokens(
        &self,
        entry: &Arc<ModelEntry>,
        text: &Arc<ModelText>,
        input: Input,
    ) -> Result<Vec<u32>, Fault> {
        let size = match &input {
            Input::Tokens(ids) => {
                check_ids("prompt", ids, entry.vocab_size)?;
                0
            }
            Input::Text { text, .. } => text.len(),
            Input::Chat(chat) => chat.messages.iter().map(approximate_bytes).sum(),
        };
        let inline = match text.tokenizer.is_own() {
            true => INLINE_BYTES,
            false => INLINE_LIBRARY_BYTES,
        };
        if size <= inline {
            return encode(entry, text, input, &self.0.metrics);
        }
        let (model, text, metrics) = (Arc::clone(entry), Arc::clone(text), Arc::clone(&self.0.metrics));
        let permit = Arc::clone(&self.0.encoders)
            .acquire_owned()
            .await
            .expect("never closed");
        let job = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            encode(&model, &text, input, &metrics)
        });
        let failed = |error| format!("its tokenizer failed on a prompt: {error}");
        job.await.map_err(|error| Fault::Model {
            model: entry.name.clone(),
            why: failed(error),
        })?
    }
}

fn no_files(entry: &ModelEntry) -> Fault {
    let refusal = Refusal::NoReplica {
        model: entry.name.clone(),
        retry_after: FILES_SOON,
    };
    refusal.into()
}

/// What a JSON value weighs, roughly, without writing it.
fn approximate_bytes(value: &serde_json::Value) -> usize {
    match value {
        serde_json::Value::String(text) => text.len(),
        serde_json::Value::Array(items) => items.iter().map(approximate_bytes).sum(),
        serde_json::Value::Object(entries) => entries
            .iter()
            .map(|(key, item)| key.len() + approximate_bytes(item))
            .sum(),
        _ => 8,
    }
}

/// Text to ids, on whatever thread this is called.
fn encode(entry: &ModelEntry, text: &ModelText, input: Input, metrics: &Metrics) -> Result<Vec<u32>, Fault> {
    let (prompt, add_special) = match input {
        Input::Tokens(ids) => return Ok(ids),
        Input::Text { text, add_special } => (text, add_special),
        Input::Chat(chat) => (render(entry, text, &chat, metrics)?, chat.add_special),
    };
    // Known to be too long before a byte of it is read.
    let least = text.tokenizer.least_tokens(prompt.len());
    let context = entry.max_model_len;
    if least > context as usize {
        let bytes = prompt.len();
        let why =
            format!("has {bytes} bytes and so at least {least} tokens; the model's context has {context}");
        return Err(Invalid {
            field: "prompt".into(),
            why,
            reason: PROMPT_TOO_LONG,
        }
        .into());
    }
    let started = Clock::now();
    let ids = text.tokenizer.encode(&prompt, add_special);
    metrics.stage(Stage::Tokenize, started.elapsed());
    ids.map_err(|error| Invalid::new("prompt", error.to_string()).into())
}

/// A conversation as the text that the model's template makes of it.
fn render(entry: &ModelEntry, text: &ModelText, chat: &Chat, metrics: &Metrics) -> Result<String, Fault> {
    let template = match &text.template {
        Some(Ok(template)) => template,
        Some(Err(error)) => {
            return Err(Fault::Model {
                model: entry.name.clone(),
                why: error.to_string(),
            });
        }
        None => {
            let why = "the model has no chat template; use plain completions, or give the model's folder a \
                       chat_template.jinja";
            return Err(Invalid::unsupported("messages", why).into());
        }
    };
    let has_calls = |message: &serde_json::Value| message.get("tool_calls").is_some();
    if chat.messages.iter().any(has_calls) && !template.shows_calls() {
        let why = "have tool_calls, which the model's chat template does not show";
        return Err(Invalid::unsupported("messages", why).into());
    }
    for name in ["tools", "documents"] {
        if chat.args.contains_key(name) && !template.reads(name) {
            let why = format!(
                "the model's chat template does not read {name}; give the model's folder a \
                               chat_template.jinja that does"
            );
            return Err(Invalid::unsupported(name, why).into());
        }
    }
    let conversation = Conversation {
        messages: &chat.messages,
        add_generation_prompt: chat.add_generation_prompt,
        args: &chat.args,
    };
    let started = Clock::now();
    let rendered = template.render(&conversation, &text.special, &jiff::Zoned::now());
    metrics.stage(Stage::Template, started.elapsed());
    let mut rendered = rendered.map_err(|error| match error {
        TemplateError::Raised(why) => Invalid::new("messages", why),
        error => Invalid::new("messages", error.to_string()),
    })?;
    if chat.continue_final {
        let content = chat
            .messages
            .last()
            .and_then(|message| message["content"].as_str());
        let end = end_of_last(&rendered, content.unwrap_or_default()).ok_or_else(|| {
            let why = "the last message is empty, or the chat template does not show it: there is nothing to go on with";
            Invalid::new("continue_final_message", why)
        })?;
        rendered.truncate(end);
    }
    Ok(rendered)
}

fn check_ids(field: &'static str, ids: &[u32], vocab_size: u32) -> Result<(), Invalid> {
    match ids.iter().position(|&id| id >= vocab_size) {
        Some(at) => Err(Invalid::new(
            field,
            format!(
                "token id {} at position {at} is outside of the vocabulary of {vocab_size}",
                ids[at]
            ),
        )),
        None => Ok(()),
    }
}

/// The last checks, which need the prompt's length and the vocabulary.
fn prepared(
    request: Request,
    entry: Arc<ModelEntry>,
    text: Arc<ModelText>,
    prompt: Vec<u32>,
    arrived: Clock,
) -> Result<Prepared, Fault> {
    let stop = request.stop;
    check_ids("stop_token_ids", &stop.token_ids, entry.vocab_size)?;
    let biased: Vec<u32> = request.sampling.logit_bias.iter().map(|&(id, _)| id).collect();
    check_ids("logit_bias", &biased, entry.vocab_size)?;
    let max_tokens = max_tokens(&stop, prompt.len(), entry.max_model_len)?;
    // A stop string that is exactly one added token never shows up in text that leaves such tokens out.
    let texts: Vec<(u32, String)> = stop
        .strings
        .iter()
        .filter_map(|string| Some((text.tokenizer.added_token(string)?, string.clone())))
        .collect();
    let mut stop_token_ids = stop.token_ids.clone();
    stop_token_ids.extend(texts.iter().map(|(id, _)| *id));
    stop_token_ids.sort_unstable();
    stop_token_ids.dedup();
    let mut any = stop_token_ids.clone();
    if !stop.ignore_eos {
        any.extend(&entry.eos_token_ids);
    }
    let wording = Wording {
        skip_special: request.skip_special,
        shown: request.shown.and_then(|token| text.tokenizer.added_token(token)),
        include_stop: stop.include,
        min_tokens: stop.min_tokens,
        stops: StopSet::new(stop.strings),
    };
    let mut sampling = request.sampling;
    // Chosen here, so that another replica can go on with the same draws.
    sampling.seed.get_or_insert_with(rand::random);
    let ask = Ask {
        model: entry.name.clone(),
        uuid: Uuid::new_v4(),
        prompt: prompt.into(),
        candidates: request.candidates,
        sampling,
        max_tokens,
        min_tokens: stop.min_tokens.min(max_tokens),
        stop_token_ids,
        ignore_eos: stop.ignore_eos,
        grammar: request.grammar.map(Arc::new),
        logprobs: request.logprobs,
        prompt_logprobs: request.prompt_logprobs,
        prompt_logprobs_from: request.prompt_logprobs_from,
        cache_salt: swallow_proto::prefix::salt(&request.cache_salt),
        share: crate::keys::share(),
        deadline: request.deadline,
        max_queue_wait: request.max_queue_wait,
    };
    let ends = Ends {
        any,
        named: stop.token_ids,
        texts,
    };
    Ok(Prepared {
        ask,
        entry,
        text,
        wording: Arc::new(wording),
        ends,
        arrived,
    })
}

fn max_tokens(stop: &Stop, prompt: usize, context: u32) -> Result<u32, Invalid> {
    let too_long = |why: String| Invalid {
        field: "prompt".into(),
        why,
        reason: PROMPT_TOO_LONG,
    };
    if prompt == 0 {
        return Err(Invalid::new(
            "prompt",
            "is empty: there is no token to continue from",
        ));
    }
    let room = u32::try_from(prompt)
        .ok()
        .and_then(|prompt| context.checked_sub(prompt));
    let Some(room) = room.filter(|&room| room > 0 || stop.max_tokens == Some(0)) else {
        let why =
            format!("has {prompt} tokens; the model's context of {context} leaves no room for an answer");
        return Err(too_long(why));
    };
    match (stop.max_tokens, stop.unasked) {
        (Some(asked), _) if asked > room => Err(too_long(format!(
            "has {prompt} tokens, and max_tokens asks for {asked} more: together {} exceed the model's context of \
             {context}; shorten the prompt or ask for at most {room}",
            prompt as u64 + u64::from(asked)
        ))),
        (Some(asked), _) => Ok(asked),
        (None, Unasked::ContextEnd) => Ok(room),
        (None, Unasked::Tokens(tokens)) => Ok(tokens.min(room)),
    }
}

/// `work`, unless the client's deadline passes first.
pub(crate) async fn in_time<T>(
    deadline: Option<Instant>,
    work: impl Future<Output = Result<T, Fault>>,
) -> Result<T, Fault> {
    match deadline {
        None => work.await,
        Some(at) => tokio::time::timeout_at(at, work)
            .await
            .unwrap_or_else(|_| Err(Refusal::Deadline.into())),
    }
}
