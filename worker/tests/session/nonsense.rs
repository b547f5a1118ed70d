//! Routers that send nonsense: frames that are damaged, repeated and invented, as bytes. The worker names what is wrong,
//! ends that session, holds nothing of it, and other routers notice nothing.

#[path = "../../../tests/support/raw.rs"]
mod raw;

use std::time::Instant;

use prost::Message;
use swallow_rpc::worker::v1::{
    Cancel, Grammar, Ping, Request, Sampling, SessionRequest, SessionResponse, Submit, Window,
    grammar::Source, session_request::Frame,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming, client::Grpc, codegen::http::uri::PathAndQuery};

use raw::Raw;

use crate::{
    fake::echo,
    harness::{Setup, Worker, hello, request, soon},
};

/// Every frame of this test follows from it.
const SEED: u64 = 0x0DD_F4A3E5;
const SESSIONS: usize = 1500;
const FRAMES_MAX: usize = 12;
/// What the process may grow by.
const GROWTH_MAX: usize = 64 << 20;

/// A session of bytes.
struct Session {
    to: mpsc::Sender<Vec<u8>>,
    from: Result<Streaming<Vec<u8>>, Status>,
}

impl Session {
    async fn open(worker: &Worker, first: Vec<u8>) -> Self {
        let (to, frames) = mpsc::channel(64);
        to.send(first).await.expect("room");
        let mut grpc = Grpc::new(worker.channel().await);
        grpc.ready().await.expect("it listens");
        let path = PathAndQuery::from_static("/swallow.worker.v1.WorkerService/Session");
        let frames = tonic::Request::new(ReceiverStream::new(frames));
        let answer = soon("an answer", grpc.streaming(frames, path, Raw)).await;
        Self {
            to,
            from: answer.map(tonic::Response::into_inner),
        }
    }

    /// Says no more and reads to the end: how it ended.
    async fn end(self) -> Result<(), Status> {
        drop(self.to);
        let mut from = self.from?;
        while let Some(said) = soon("the stream's end", from.message()).await? {
            SessionResponse::decode(&*said).expect("what the worker says is a message");
        }
        Ok(())
    }
}

fn bytes(frame: Frame) -> Vec<u8> {
    SessionRequest { frame: Some(frame) }.encode_to_vec()
}

fn odd(rng: &mut fastrand::Rng) -> u32 {
    match rng.u8(0..5) {
        0 => 0,
        1 => u32::MAX,
        2 => rng.u32(..),
        _ => rng.u32(0..40),
    }
}

fn odd_number(rng: &mut fastrand::Rng) -> f32 {
    let odd = [
        f32::NAN,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::MIN_POSITIVE,
        -1.0,
        0.0,
        1e30,
        0.7,
    ];
    *rng.choice(&odd).expect("not empty")
}

/// A request in its form, most of it senseless.
fn odd_request(rng: &mut fastrand::Rng) -> Request {
    let maybe = |rng: &mut fastrand::Rng| rng.bool().then(|| odd_number(rng));
    let (handle, n_prompt) = (odd(rng), rng.usize(0..30));
    let sampling = Sampling {
        temperature: maybe(rng),
        top_p: maybe(rng),
        top_k: rng.bool().then(|| odd(rng)),
        min_p: maybe(rng),
        presence_penalty: maybe(rng),
        frequency_penalty: maybe(rng),
        repetition_penalty: maybe(rng),
        seed: rng.bool().then(|| rng.u64(..)),
        logit_bias: (0..rng.usize(0..3))
            .map(|_| (odd(rng), odd_number(rng)))
            .collect(),
    };
    let source = match rng.u8(0..12) {
        0 => Some(Source::Regex("(a|".into())),
        1 => Some(Source::Lark("start: start".into())),
        2 => Some(Source::JsonSchema("{\"$ref\": \"#\"}".into())),
        3 => None,
        _ => Some(Source::JsonSchema("x".repeat(rng.usize(0..200)))),
    };
    Request {
        handle,
        request_uuid: (0..rng.usize(0..20)).map(|_| rng.u8(..)).collect(),
        attempt: odd(rng),
        candidate: odd(rng),
        prompt_ids: (0..n_prompt).map(|_| odd(rng)).collect(),
        sampling: rng.bool().then_some(sampling),
        max_tokens: odd(rng),
        min_tokens: odd(rng),
        stop_token_ids: (0..rng.usize(0..4)).map(|_| odd(rng)).collect(),
        ignore_eos: rng.bool(),
        logprobs: rng.bool().then(|| odd(rng)),
        prompt_logprobs: (rng.u8(0..4) == 0).then(|| odd(rng)),
        budget: (rng.u8(0..4) == 0).then(|| prost_types::Duration {
            seconds: rng.i64(..),
            nanos: rng.i32(..),
        }),
        cache_salt: rng.u64(..),
        resumed_tokens: if rng.bool() { 0 } else { odd(rng) },
        grammar: (rng.u8(0..3) == 0).then_some(Grammar { source }),
        window_tokens: odd(rng),
        prompt_logprobs_from: odd(rng),
    }
}

fn sound_frame(rng: &mut fastrand::Rng, handle: u32) -> Vec<u8> {
    match rng.u8(0..8) {
        0 => bytes(Frame::Ping(Ping { nonce: rng.u64(..) })),
        1 => bytes(Frame::Cancel(Cancel {
            handles: (0..rng.usize(0..9)).map(|_| odd(rng)).collect(),
            reason: rng.i32(-2..9),
        })),
        2 => bytes(Frame::Window(Window {
            handle: (0..rng.usize(0..4)).map(|_| odd(rng)).collect(),
            output_tokens: (0..rng.usize(0..4)).map(|_| odd(rng)).collect(),
        })),
        3..6 => {
            let prompt: Vec<u32> = (0..rng.u32(1..20)).collect();
            let mut request = request(handle, &prompt, rng.u32(1..30));
            request.request_uuid[..8].copy_from_slice(&rng.u64(..).to_be_bytes());
            bytes(Frame::Submit(Submit {
                requests: vec![request],
            }))
        }
        _ => bytes(Frame::Submit(Submit {
            requests: (0..rng.usize(0..5)).map(|_| odd_request(rng)).collect(),
        })),
    }
}

/// Sometimes as it is.
fn damaged(rng: &mut fastrand::Rng, mut frame: Vec<u8>) -> Vec<u8> {
    match rng.u8(0..8) {
        0 => return (0..rng.usize(0..300)).map(|_| rng.u8(..)).collect(),
        1 | 2 => {
            for _ in 0..rng.usize(1..4) {
                let at = rng.usize(0..=frame.len());
                match rng.u8(0..3) {
                    0 if at < frame.len() => frame[at] = rng.u8(..),
                    1 => frame.truncate(at),
                    _ => frame.insert(at, rng.u8(..)),
                }
            }
        }
        _ => {}
    }
    frame
}

fn resident_bytes() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").expect("Linux");
    let pages = statm
        .split_whitespace()
        .nth(1)
        .and_then(|pages| pages.parse::<usize>().ok());
    pages.expect("a number") * 4096
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_frames_end_their_session_and_hurt_nobody() {
    let worker = Worker::ready(Setup {
        max_running: 8,
        max_waiting: 64,
        ..Setup::default()
    })
    .await;
    let mut rng = fastrand::Rng::with_seed(SEED);
    let mut honest = worker.router().await;
    let (began, before) = (Instant::now(), resident_bytes());
    let (mut ended_by_worker, mut asked) = (0, 0);
    for n in 0..SESSIONS {
        let said = match rng.u8(0..10) {
            0 => damaged(&mut rng, bytes(Frame::Ping(Ping::default()))),
            _ => bytes(Frame::Hello(hello())),
        };
        let session = Session::open(&worker, said).await;
        for handle in 0..rng.u32(0..FRAMES_MAX as u32) {
            let frame = sound_frame(&mut rng, handle + 1);
            let frame = damaged(&mut rng, frame);
            // It is closed to whoever broke the protocol.
            if session.from.is_err() || session.to.send(frame).await.is_err() {
                break;
            }
        }
        if let Err(status) = session.end().await {
            ended_by_worker += 1;
            let known = [Code::InvalidArgument, Code::Internal, Code::FailedPrecondition];
            assert!(known.contains(&status.code()), "{status}");
            assert!(!status.message().is_empty(), "it says what is wrong: {status}");
        }
        // The other router's requests run as ever.
        if n % 10 == 0 {
            honest.until("a credit", |router| router.credits > 0).await;
            asked += 1;
            let (handle, prompt) = (1000 + asked, [7, 8, 9]);
            honest.submit(vec![request(handle, &prompt, 6)]).await;
            let told: Vec<u32> = (0..6).map(|i| echo(&prompt, i)).collect();
            assert_eq!(honest.finished(handle).await.tokens, told);
        }
    }
    println!(
        "{ended_by_worker} of {SESSIONS} sessions were ended in {:?}",
        began.elapsed()
    );
    assert!(ended_by_worker > SESSIONS / 4, "{ended_by_worker}: too tame");
    worker.controls.empty().await;
    honest.ping(1).await;
    honest
        .until("an empty worker", |router| {
            let load = router.load;
            (load.running, load.waiting, load.kv_blocks_used) == (0, 0, 0)
        })
        .await;
    let grown = resident_bytes().saturating_sub(before);
    assert!(grown < GROWTH_MAX, "{grown} bytes");
}
