//! The progress of a running fetch, read over HTTP from the real program.

use std::{
    net::TcpListener,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

use crate::{
    folder,
    hub::{FIRST, Fault, Hub},
};

struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn state(port: u16) -> Option<Value> {
    let mut answer = ureq::get(format!("http://127.0.0.1:{port}/state")).call().ok()?;
    serde_json::from_str(&answer.body_mut().read_to_string().ok()?).ok()
}

#[test]
fn how_far_it_is_can_be_asked_while_it_stands_still() {
    let (hub, (_dir, out)) = (Hub::model(), folder());
    hub.fail(FIRST, &[Fault::Stall(700)]);
    let before: usize = {
        let state = hub.state();
        // The large files come last, in the order of their names.
        let texts = state
            .files
            .iter()
            .filter(|(name, _)| crate::WANTED.contains(&name.as_str()) && !name.ends_with(".safetensors"))
            .map(|(_, bytes)| bytes.len());
        texts.sum()
    };
    let port = TcpListener::bind("127.0.0.1:0")
        .and_then(|free| free.local_addr())
        .expect("a free port")
        .port();
    let mut args = hub.args(&out);
    args.http_listen = Some(([127, 0, 0, 1], port).into());
    let child = Command::new(env!("CARGO_BIN_EXE_swallow-worker"))
        .args(args.argv())
        .stdout(Stdio::null())
        .spawn()
        .expect("the worker was built");
    let mut child = Ended(child);
    let give_up = Instant::now() + Duration::from_secs(30);
    let told = loop {
        if let Some(state) = state(port)
            && state["progress"]["bytes_done"].as_u64().unwrap_or_default() >= 700
        {
            break state;
        }
        assert!(Instant::now() < give_up, "it never got so far: {:?}", state(port));
        std::thread::yield_now();
    };
    assert_eq!(told["phase"], "fetching");
    let total: usize = {
        let state = hub.state();
        crate::WANTED.iter().map(|name| state.files[*name].len()).sum()
    };
    assert_eq!(told["progress"]["bytes_total"], total);
    let done = told["progress"]["bytes_done"].as_u64().unwrap_or_default() as usize;
    assert!(
        done <= before + 700 && done < total,
        "{done} of {total}, {before} before the stall"
    );
    // Its end can be asked for too, as the first process of a container as well.
    let pid = Pid::from_raw(i32::try_from(child.0.id()).expect("a process id"));
    kill(pid, Signal::SIGTERM).expect("it runs");
    let ended = child.0.wait().expect("it ends");
    assert_eq!(ended.code(), Some(143));
}

#[test]
fn an_address_that_is_taken_is_named() {
    let (hub, (_dir, out)) = (Hub::model(), folder());
    let taken = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let mut args = hub.args(&out);
    args.http_listen = taken.local_addr().ok();
    let done = Command::new(env!("CARGO_BIN_EXE_swallow-worker"))
        .args(args.argv())
        .output()
        .expect("the worker was built");
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(!done.status.success());
    assert!(
        said.contains("--http-listen") && said.contains("127.0.0.1"),
        "{said}"
    );
    assert!(hub.state().seen.is_empty(), "nothing was fetched");
}
