//! Fetching from a small endpoint in this process, which fails in every way that real ones do.

mod door;
mod hub;
mod secure;

use std::{
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
    time::Duration,
};

use serde_json::{Value, json};
use swallow_proto::launch::FetchArgs;
use swallow_worker::fetch::{Event, FetchError, Patience, Report, fetch};
use tempfile::TempDir;

use hub::{
    FIRST, Fault, Hub, INDEX, REPO, REVISION, SECOND, git_blob, listing, listing_path, noise, sharded_model,
};

const WANTED: [&str; 6] = [
    "chat_template.jinja",
    "config.json",
    FIRST,
    SECOND,
    INDEX,
    "tokenizer.json",
];

#[derive(Default)]
struct Told(Vec<Event>);

impl Report for Told {
    fn event(&mut self, event: &Event) {
        self.0.push(event.clone());
    }
}

fn quick(retries: u32) -> Patience {
    Patience {
        retries,
        first_wait: Duration::from_millis(1),
        ..Patience::default()
    }
}

/// Fetches with three retries and returns what was told.
fn run(args: &FetchArgs) -> Result<Vec<Event>, FetchError> {
    let mut told = Told::default();
    fetch(args, &quick(3), &mut told).map(|()| told.0)
}

fn refused(args: &FetchArgs) -> String {
    let line = fetch(args, &quick(1), &mut Told::default())
        .expect_err("a refusal")
        .to_string();
    assert!(!line.contains('\n'), "{line:?}");
    line
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).expect("a folder");
    let mut names: Vec<String> = entries
        .map(|entry| entry.expect("an entry").file_name().into_string().expect("UTF-8"))
        .filter(|name| name != ".fetch.lock" && name != ".fetched.json")
        .collect();
    names.sort();
    names
}

fn check_files(dir: &Path, hub: &Hub, wanted: &[&str]) {
    assert_eq!(names(dir), wanted);
    for name in wanted {
        assert!(
            fs::read(dir.join(name)).expect("a file") == hub.state().files[*name],
            "{name}"
        );
    }
}

fn folder() -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let out = dir.path().join("models").join("one");
    (dir, out)
}

/// The partial file of `name`, found by its name's beginning.
fn partial(out: &Path, name: &str) -> PathBuf {
    let held = names(&out.join(".partial"));
    let found = held
        .iter()
        .find(|held| held.starts_with(name))
        .expect("a partial file");
    out.join(".partial").join(found)
}

#[test]
fn what_serving_needs_arrives_once() {
    let (hub, (_dir, out)) = (Hub::model(), folder());
    let told = run(&hub.args(&out)).expect("a fetched model");
    check_files(&out, &hub, &WANTED);
    let total = WANTED
        .iter()
        .map(|name| hub.state().files[*name].len() as u64)
        .sum();
    assert!(told.contains(&Event::Planned {
        files: 6,
        bytes_total: total
    }));
    let last = told.iter().rev().find_map(|event| match event {
        Event::Progress {
            bytes_done,
            bytes_total,
            ..
        } => Some((*bytes_done, *bytes_total)),
        _ => None,
    });
    assert_eq!(last, Some((total, total)));
    assert_eq!(told.last(), Some(&Event::Complete { bytes_total: total }));

    let requests = hub.state().seen.len();
    assert_eq!(
        requests,
        1 + WANTED.len(),
        "one for the list and one for each file"
    );
    let told = run(&hub.args(&out)).expect("a complete folder");
    assert_eq!(told, [Event::AlreadyComplete { bytes_total: total }]);
    assert_eq!(
        hub.state().seen.len(),
        requests,
        "a complete folder asks for nothing"
    );

    // A file that lost its length is fetched again, alone.
    fs::write(out.join(SECOND), "short").expect("a damaged file");
    run(&hub.args(&out)).expect("a repaired folder");
    check_files(&out, &hub, &WANTED);
    assert_eq!(hub.state().seen.len(), requests + 2);
}

#[test]
fn a_model_in_one_file_needs_no_index() {
    let mut files = sharded_model();
    files.insert("model.safetensors".into(), noise(1000, 9));
    files.insert("generation_config.json".into(), b"{}".to_vec());
    let (hub, (_dir, out)) = (Hub::start("", files), folder());
    run(&hub.args(&out)).expect("a fetched model");
    let wanted = [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ];
    check_files(&out, &hub, &wanted);
}

#[test]
fn a_cut_connection_is_continued() {
    let (hub, (_dir, out)) = (Hub::model(), folder());
    hub.fail(FIRST, &[Fault::Cut(1_000_000), Fault::Cut(500_000)]);
    let told = run(&hub.args(&out)).expect("a fetched model");
    check_files(&out, &hub, &WANTED);
    let ranges = hub.ranges(FIRST);
    assert_eq!(
        ranges,
        [None, Some("bytes=1000000-".into()), Some("bytes=1500000-".into())]
    );
    let retries = told
        .iter()
        .filter(|event| matches!(event, Event::Retry { .. }))
        .count();
    assert_eq!(retries, 2);
}

#[test]
fn a_later_run_continues_an_earlier_one() {
    let (hub, (_dir, out)) = (Hub::model(), folder());
    hub.fail(
        FIRST,
        &[
            Fault::Cut(1_000_000),
            Fault::Status(500, ""),
            Fault::Status(503, ""),
        ],
    );
    let mut told = Told::default();
    let error = fetch(&hub.args(&out), &quick(1), &mut told).expect_err("two failures in a row");
    let url = format!("http://127.0.0.1:{}/{REPO}/resolve/{REVISION}/{FIRST}", hub.port);
    assert_eq!(
        error.to_string(),
        format!(
            "{url}: gave up after 2 tries in a row, the last ended with: HTTP 500 Internal Server Error; \
             run the command again to continue"
        )
    );
    assert!(!out.join(FIRST).exists(), "an incomplete file has no final name");
    hub.fail(FIRST, &[]);
    run(&hub.args(&out)).expect("a fetched model");
    check_files(&out, &hub, &WANTED);
    assert_eq!(hub.ranges(FIRST).last(), Some(&Some("bytes=1000000-".into())));
    assert_eq!(
        hub.ranges("tokenizer.json").len(),
        1,
        "finished files are not asked for again"
    );
}

#[test]
fn an_endpoint_without_ranges_starts_over() {
    let (hub, (_dir, out)) = (Hub::model(), folder());
    hub.fail(FIRST, &[Fault::Cut(1_000_000), Fault::NoRange]);
    run(&hub.args(&out)).expect("a fetched model");
    check_files(&out, &hub, &WANTED);
    hub.fail(
        SECOND,
        &[Fault::Cut(1000), Fault::Status(416, ""), Fault::NoRange],
    );
    fs::remove_file(out.join(SECOND)).expect("a file to lose");
    run(&hub.args(&out)).expect("a fetched model");
    check_files(&out, &hub, &WANTED);
}

#[test]
fn a_silent_connection_is_given_up() {
    let (hub, (_dir, out)) = (Hub::model(), folder());
    hub.fail(FIRST, &[Fault::Stall(1_000_000)]);
    let patience = Patience {
        stall: Duration::from_millis(200),
        ..quick(1)
    };
    fetch(&hub.args(&out), &patience, &mut Told::default()).expect("a fetched model");
    check_files(&out, &hub, &WANTED);
    assert_eq!(hub.ranges(FIRST), [None, Some("bytes=1000000-".into())]);
}

#[test]
fn wrong_bytes_never_get_their_final_name() {
    let (hub, (_dir, out)) = (Hub::model(), folder());
    for (name, kind) in [("tokenizer.json", "git blob"), (FIRST, "sha256")] {
        hub.fail(name, &[Fault::Garbled]);
        let line = refused(&hub.args(&out));
        assert!(line.starts_with(&format!("{name}: expected {kind} ")), "{line}");
        assert!(
            line.ends_with("after a complete download; the endpoint or the network corrupts data"),
            "{line}"
        );
        assert!(!out.join(name).exists());
    }
    // A bad part from an earlier run is noticed, thrown away and fetched anew.
    hub.fail(
        FIRST,
        &[
            Fault::Cut(1_000_000),
            Fault::Status(500, ""),
            Fault::Status(500, ""),
        ],
    );
    refused(&hub.args(&out));
    let part = partial(&out, FIRST);
    let mut bytes = fs::read(&part).expect("a partial file");
    bytes[5] ^= 1;
    fs::write(&part, bytes).expect("a damaged partial file");
    run(&hub.args(&out)).expect("a fetched model");
    check_files(&out, &hub, &WANTED);
    assert_eq!(
        hub.ranges(FIRST).last(),
        Some(&None),
        "the whole file was asked for"
    );
}

#[test]
fn answers_that_trying_again_will_not_change_end_at_once() {
    let (hub, (_dir, out)) = (Hub::model(), folder());
    let url = format!("http://127.0.0.1:{}{}", hub.port, listing_path());
    for (fault, expected) in [
        (
            Fault::Status(401, "X-Error-Message: Invalid username or password.\r\n"),
            "the endpoint wants a valid access token (HTTP 401, Invalid username or password.); \
             give one with --token-file",
        ),
        (
            Fault::Status(403, ""),
            "access is refused (HTTP 403); accept the model's licence on its page with the token's account",
        ),
        (
            Fault::Status(404, "X-Error-Message: Repository not found\r\n"),
            "not found (HTTP 404, Repository not found); check --repo, --revision and --endpoint, or give --token-file",
        ),
        (
            Fault::Status(418, ""),
            "expected HTTP 200 OK, found HTTP 418 I'm a teapot",
        ),
        (
            Fault::Status(302, ""),
            "expected a redirect to an http address, found HTTP 302 Found without one",
        ),
    ] {
        hub.fail_listing(&[fault]);
        assert_eq!(refused(&hub.args(&out)), format!("{url}: {expected}"));
    }
    assert_eq!(hub.state().seen.len(), 5, "one request each");
    let here = format!("http://127.0.0.1:{}/around", hub.port);
    hub.fail_listing(&[Fault::Redirect(here.clone())]);
    hub.state()
        .faults
        .insert("/around".into(), vec![Fault::Redirect(here); 20]);
    assert_eq!(
        refused(&hub.args(&out)),
        format!("{url}: expected at most 10 redirects, found more")
    );
}

#[test]
fn passing_failures_are_tried_again() {
    let (hub, (_dir, out)) = (Hub::model(), folder());
    let unavailable = Fault::Status(503, "Retry-After: 0\r\n");
    hub.fail_listing(&[
        Fault::Status(429, "Retry-After: 0\r\n"),
        Fault::Cut(10),
        unavailable,
    ]);
    let told = run(&hub.args(&out)).expect("a fetched model");
    check_files(&out, &hub, &WANTED);
    let retries: Vec<(&str, Duration)> = told
        .iter()
        .filter_map(|event| match event {
            Event::Retry { reason, wait, .. } => Some((reason.as_str(), *wait)),
            _ => None,
        })
        .collect();
    assert_eq!(retries.len(), 3, "{retries:?}");
    assert_eq!(retries[0], ("HTTP 429 Too Many Requests", Duration::ZERO));
    assert_eq!(retries[1].1, Duration::from_millis(2), "the wait doubles");
    assert_eq!(retries[2], ("HTTP 503 Service Unavailable", Duration::ZERO));

    // Nobody listens on a port that was just given back.
    let port = TcpListener::bind("127.0.0.1:0")
        .and_then(|l| l.local_addr())
        .expect("a free port")
        .port();
    let mut args = hub.args(&out.join("elsewhere"));
    args.endpoint = format!("http://127.0.0.1:{port}");
    let line = refused(&args);
    assert!(
        line.contains("gave up after 2 tries in a row") && line.contains("Connection refused"),
        "{line}"
    );
}

#[test]
fn the_token_stays_with_the_endpoint() {
    let (hub, storage, (dir, out)) = (Hub::model(), Hub::model(), folder());
    let token_file = dir.path().join("token");
    fs::write(&token_file, "hf_secret\n").expect("a token file");
    // To another port, and to another place of the same one.
    hub.fail(
        FIRST,
        &[Fault::Redirect(format!(
            "http://127.0.0.1:{}/blobs/{FIRST}?signed=1",
            storage.port
        ))],
    );
    storage.state().faults.insert(
        format!("/blobs/{FIRST}?signed=1"),
        vec![Fault::Redirect(format!("/b/{FIRST}"))],
    );
    hub.fail(SECOND, &[Fault::Redirect(format!("/renamed/{SECOND}"))]);
    let args = FetchArgs {
        token_file: Some(token_file.clone()),
        ..hub.args(&out)
    };
    run(&args).expect("a fetched model");
    check_files(&out, &hub, &WANTED);
    let token = Some("Bearer hf_secret".to_owned());
    assert!(
        hub.state().seen.iter().all(|seen| seen.token == token),
        "{:?}",
        hub.state().seen
    );
    assert!(
        hub.state()
            .seen
            .iter()
            .any(|seen| seen.path == format!("/renamed/{SECOND}"))
    );
    let there = &storage.state().seen;
    assert_eq!(there.len(), 2);
    assert!(there.iter().all(|seen| seen.token.is_none()), "{there:?}");

    for (text, found) in [
        ("", "something else"),
        ("two words", "something else"),
        ("日本", "something else"),
    ] {
        fs::write(&token_file, text).expect("a token file");
        let args = FetchArgs {
            token_file: Some(token_file.clone()),
            ..hub.args(&out.join("other"))
        };
        let line = refused(&args);
        assert!(
            line.starts_with(&format!(
                "--token-file: expected a file with one token, found {found} in /"
            )),
            "{line}"
        );
        assert!(text.is_empty() || !line.contains(text), "a secret is never shown");
    }
    let args = FetchArgs {
        token_file: Some("/no/token".into()),
        ..hub.args(&out.join("other"))
    };
    assert!(refused(&args).ends_with("--token-file must name a readable file with one token"));
}

#[test]
fn a_mirror_may_live_under_a_path() {
    let (hub, (_dir, out)) = (Hub::start("/mirror/hf", sharded_model()), folder());
    let mut args = hub.args(&out);
    args.endpoint.push('/');
    run(&args).expect("a fetched model");
    check_files(&out, &hub, &WANTED);
    assert!(
        hub.state()
            .seen
            .iter()
            .all(|seen| seen.path.starts_with("/mirror/hf/"))
    );
}

#[test]
fn another_commit_replaces_the_files_of_the_last() {
    let (hub, (_dir, out)) = (Hub::model(), folder());
    run(&hub.args(&out)).expect("a fetched model");
    fs::write(out.join("notes.txt"), "the user's own").expect("a file");
    let mut files = sharded_model();
    files.insert("model.safetensors".into(), noise(1000, 9));
    files.insert("config.json".into(), b"{\"new\": 1}".to_vec());
    let hub = Hub::start("", files);
    let revision = "f".repeat(40);
    let listing = {
        let mut listing = listing(&hub.state().files);
        listing["sha"] = json!(revision);
        listing
    };
    let path = listing_path().replace(REVISION, &revision);
    hub.state()
        .faults
        .insert(path.clone(), vec![Fault::Redirect(listing_path())]);
    hub.state().listing = Some(listing);
    let args = FetchArgs {
        revision: revision.to_uppercase(),
        ..hub.args(&out)
    };
    run(&args).expect("a fetched model");
    let left = [
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
        "notes.txt",
        "tokenizer.json",
    ];
    assert_eq!(names(&out), left);
    assert_eq!(
        fs::read(out.join("config.json")).expect("a file"),
        b"{\"new\": 1}"
    );
    assert_eq!(hub.ranges("tokenizer.json").len(), 0, "an equal file is kept");
}

#[test]
fn two_runs_on_one_folder_take_turns() {
    let (hub, (_dir, out)) = (Hub::model(), folder());
    let args = hub.args(&out);
    std::thread::scope(|scope| {
        let runs: Vec<_> = (0..3).map(|_| scope.spawn(|| run(&args))).collect();
        for one in runs {
            one.join().expect("no panic").expect("a fetched model");
        }
    });
    check_files(&out, &hub, &WANTED);
    assert_eq!(hub.ranges(FIRST), [None], "each file came once");
}

#[test]
fn hostile_and_useless_listings_are_refused() {
    let (hub, (dir, out)) = (Hub::model(), folder());
    let refusal = |siblings: Value| {
        hub.state().listing = Some(json!({"sha": REVISION, "siblings": siblings}));
        let line = refused(&hub.args(&out));
        line.replace(&format!("http://127.0.0.1:{}{}", hub.port, listing_path()), "URL")
    };
    let plain = |name: &str| json!({"rfilename": name, "size": 2, "blobId": git_blob(b"{}")});
    for name in ["../evil", "/etc/evil", "a/../../evil", "a\\evil", "evil\n"] {
        let line = refusal(json!([plain("config.json"), plain(name)]));
        let found = format!("{name:?}").replace('\\', "\\");
        assert_eq!(
            line,
            format!("URL: expected file names that stay inside the repository, found {found}")
        );
    }
    assert_eq!(names(dir.path()), ["models"], "nothing was written outside");
    assert_eq!(
        refusal(json!([plain("config.json"), plain("tokenizer.json")])),
        format!(
            "{REPO}: expected model.safetensors or {INDEX}, found no such file among config.json, tokenizer.json"
        )
    );
    assert_eq!(
        refusal(json!([plain("config.json"), plain("model.safetensors")])),
        format!("{REPO}: expected tokenizer.json, found no such file among config.json, model.safetensors")
    );
    assert_eq!(
        refusal(json!([{"rfilename": "model.safetensors"}])),
        "URL: expected size and digest of model.safetensors, \
         found a listing without them; use an endpoint that answers ?blobs=true"
    );
    let lfs = json!({"sha256": "a".repeat(64), "size": 1u64 << 60});
    let huge = json!({"rfilename": "model.safetensors", "lfs": lfs});
    let line = refusal(json!([plain("config.json"), plain("tokenizer.json"), huge]));
    assert!(
        line.contains(" more bytes are needed and ") && line.contains(" are free; free some space"),
        "{line}"
    );
    assert!(
        refusal(json!("none"))
            .starts_with("URL: expected a list of the model's files as JSON, found invalid type")
    );
    hub.state().listing = Some(json!({"sha": "b".repeat(40), "siblings": []}));
    let line = refused(&hub.args(&out));
    assert!(
        line.ends_with(&format!(
            "expected commit {REVISION}, found commit {}",
            "b".repeat(40)
        )),
        "{line}"
    );
}

#[test]
fn shards_come_from_the_list_alone() {
    for (index, expected) in [
        (
            json!({"weight_map": {"a": "../evil.safetensors"}}),
            "expected ../evil.safetensors, found no such file among",
        ),
        (
            json!({"weight_map": {"a": "absent.safetensors"}}),
            "expected absent.safetensors, found no such file among",
        ),
        (
            json!({"weight_map": {"a": "original/params.json"}}),
            "expected original/params.json, found no such file among",
        ),
        (
            json!({"metadata": {}}),
            "expected a weight_map in model.safetensors.index.json, found missing field",
        ),
    ] {
        let mut files = sharded_model();
        files.insert(INDEX.into(), index.to_string().into_bytes());
        let (hub, (_dir, out)) = (Hub::start("", files), folder());
        let line = refused(&hub.args(&out));
        assert!(line.starts_with(&format!("{REPO}: {expected}")), "{line}");
    }
}

#[test]
fn arguments_are_checked_before_anything_is_asked_or_written() {
    let (hub, (_dir, out)) = (Hub::model(), folder());
    let good = hub.args(&out);
    for repo in ["model", "a/b/c", "../b", "a/..", "a/", "a b/c", "a/b?c"] {
        let line = refused(&FetchArgs {
            repo: repo.into(),
            ..good.clone()
        });
        let expected = "ORG/NAME of ASCII letters, digits, '-', '_' and '.'";
        assert_eq!(line, format!("--repo: expected {expected}, found {repo:?}"));
    }
    for revision in [
        "main",
        "",
        &REVISION[1..],
        "g123456789abcdef0123456789abcdef01234567",
    ] {
        let line = refused(&FetchArgs {
            revision: revision.into(),
            ..good.clone()
        });
        let expected = "a commit of 40 hexadecimal digits (branches and tags move)";
        assert_eq!(
            line,
            format!("--revision: expected {expected}, found {revision:?}")
        );
    }
    for endpoint in [
        "",
        "host",
        "ftp://host",
        "http://",
        "https://me:pw@host",
        "https://host/?a",
        "https://host/#a",
    ] {
        let line = refused(&FetchArgs {
            endpoint: endpoint.into(),
            ..good.clone()
        });
        let expected = "an http:// or https:// address without user name, query and fragment";
        assert_eq!(
            line,
            format!("--endpoint: expected {expected}, found {endpoint:?}")
        );
    }
    assert!(hub.state().seen.is_empty() && !out.exists());
}

#[test]
fn disks_that_cannot_be_written_are_named() {
    let (hub, (dir, out)) = (Hub::model(), folder());
    // What would hold the file leads to a device that is always full.
    hub.fail(FIRST, &[Fault::Status(500, ""), Fault::Status(500, "")]);
    refused(&hub.args(&out));
    let part = partial(&out, FIRST);
    fs::remove_file(&part).expect("a partial file");
    std::os::unix::fs::symlink("/dev/full", &part).expect("a link");
    let line = refused(&hub.args(&out));
    assert!(
        line.ends_with("No space left on device (os error 28); free some space or choose another --out"),
        "{line}"
    );

    let file = dir.path().join("file");
    fs::write(&file, "").expect("a file");
    let line = refused(&hub.args(&file.join("below")));
    assert!(line.contains("file/below: Not a directory"), "{line}");
}
