//! The worker's own side of the CUDA device, on GPUs that are not there (`fake_gpu/libraries.c`): what starts leave for each
//! other, how errors are told, how a group ends, what is recorded and chained. What kernels compute is for `tests/gpu`.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{OnceLock, mpsc},
    time::Duration,
};

use tempfile::TempDir;

/// Whole runs take a tenth of a second.
const HANGS_AFTER: Duration = Duration::from_secs(120);

/// A model whose products our own kernel has too.
const MODEL: &str = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
    "hidden_size": 2048, "intermediate_size": 4096, "num_hidden_layers": 2, "num_attention_heads": 16,
    "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 4096, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": false}"#;

/// The folder of the libraries, which the linker's own compiler makes.
fn libraries() -> &'static Path {
    static FOLDER: OnceLock<TempDir> = OnceLock::new();
    FOLDER
        .get_or_init(|| {
            let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder for this test");
            let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake_gpu/libraries.c");
            let made = Command::new("cc")
                .args(["-std=gnu11", "-shared", "-fPIC", "-O1", "-pthread", "-o"])
                .arg(folder.path().join("libcuda.so.1"))
                .arg(source)
                .output()
                .expect("Rust links with the same compiler");
            assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
            for name in ["libcublasLt.so.13", "libnvrtc.so.13", "libnccl.so.2"] {
                // One file under four names is opened once.
                std::os::unix::fs::symlink("libcuda.so.1", folder.path().join(name)).expect("writable");
            }
            folder
        })
        .path()
}

/// A machine with GPUs: what runs on it finds what earlier ones have left.
struct Machine {
    folder: TempDir,
}

/// What came of a run.
struct Ran {
    ok: bool,
    lines: Vec<serde_json::Value>,
    /// All of stderr.
    said: String,
    /// What the libraries counted.
    counts: String,
}

impl Ran {
    fn count(&self, what: &str) -> u64 {
        let line = self.counts.lines().find_map(|line| line.strip_prefix(what));
        line.and_then(|n| n.trim().parse().ok())
            .unwrap_or_else(|| panic!("{what} is not in:\n{}", self.counts))
    }
}

impl Machine {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder for this test");
        fs::write(folder.path().join("config.json"), MODEL).expect("writable");
        Self { folder }
    }

    fn cache(&self) -> PathBuf {
        self.folder.path().join("cache")
    }

    fn bench(&self, arguments: &[&str], environment: &[(&str, &str)]) -> Ran {
        let shape = format!("--shape={}", self.folder.path().join("config.json").display());
        let fixed = [
            "bench",
            &shape,
            "--device=cuda",
            "--cells=small",
            "--prefill-tokens=64",
            "--batch=1,4",
            "--context=32",
            "--output-tokens=8",
        ];
        let log = self.folder.path().join("log");
        // Of the run before.
        let _ = fs::remove_file(&log);
        let child = Command::new(env!("CARGO_BIN_EXE_swallow-worker"))
            .args(fixed)
            .args(arguments)
            .env("LD_LIBRARY_PATH", libraries())
            .env("SWALLOW_CACHE", self.cache())
            .env("FAKE_GPU_LOG", &log)
            .envs(environment.iter().copied())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary starts");
        let id = child.id();
        let (done, ended) = mpsc::channel();
        std::thread::spawn(move || {
            // Nobody listens where the run was given up.
            let _ = done.send(child.wait_with_output());
        });
        let Ok(output) = ended.recv_timeout(HANGS_AFTER) else {
            let _ = Command::new("kill").args(["-9", &id.to_string()]).status();
            panic!("it does not end: {arguments:?} {environment:?}");
        };
        let output = output.expect("its output can be read");
        let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
        Ran {
            ok: output.status.success(),
            lines: text(output.stdout)
                .lines()
                .map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("not JSON: {line}")))
                .collect(),
            said: text(output.stderr),
            // Nothing where the libraries were not opened.
            counts: fs::read_to_string(log).unwrap_or_default(),
        }
    }

    /// As [`Machine::bench`], without the starts, which must go well.
    fn runs(&self, arguments: &[&str], environment: &[(&str, &str)]) -> Ran {
        let ran = self.bench(&[&["--startup=none"], arguments].concat(), environment);
        assert!(ran.ok, "{}", ran.said);
        ran
    }

    /// As [`Machine::bench`], which must fail; the reason.
    fn fails(&self, arguments: &[&str], environment: &[(&str, &str)]) -> String {
        let ran = self.bench(&[&["--startup=none"], arguments].concat(), environment);
        assert!(!ran.ok, "{arguments:?} {environment:?}");
        let last = ran.said.lines().last().expect("a reason");
        last.to_owned()
    }

    /// Files of ways to multiply, and what they say.
    fn choices(&self) -> Vec<(PathBuf, String)> {
        let entries = fs::read_dir(self.cache().join("products")).into_iter().flatten();
        let mut files: Vec<_> = entries
            .flatten()
            .map(|entry| (entry.path(), fs::read_to_string(entry.path()).expect("text")))
            .collect();
        files.sort();
        files
    }
}

const TWO: &str = "--tensor-parallel=2";

#[test]
fn what_a_start_has_measured_is_taken_by_the_next() {
    let machine = Machine::new();
    machine.runs(&[TWO], &[]);
    let first = machine.choices();
    let [(path, text)] = &first[..] else {
        panic!("one file for both ranks: {first:?}")
    };
    // Four matrices and the head; one rank's are the other's.
    let of = |rank: &str| text.lines().filter(|line| line.starts_with(rank)).count();
    assert!(of("rank=0 ") >= 5 && of("rank=0 ") == of("rank=1 "), "{text}");
    machine.runs(&[TWO], &[]);
    assert_eq!(machine.choices(), first, "nothing was measured again");
    machine.runs(&[TWO, "--rank-alone"], &[]);
    assert_eq!(machine.choices(), first, "one rank of the group has its choices");

    // On another machine of this kind, which keeps nothing then.
    let pinned = format!("--product-choices={}", path.display());
    let other = Machine::new();
    other.runs(&[TWO, &pinned], &[]);
    assert!(other.choices().is_empty());
    let foreign = other.fails(&[&pinned], &[]);
    assert!(foreign.contains(r#"it is for "model ranks=2"#), "{foreign}");
    let missing = other.fails(&[TWO, &pinned, "--batch=9"], &[]);
    assert!(missing.contains("has no choice for rank="), "{missing}");
    let refused = other.fails(&[TWO, &pinned], &[("FAKE_GPU_REFUSE", "1")]);
    assert!(
        refused.contains("the library refuses its choice for rank="),
        "{refused}"
    );

    // What is damaged or refused is told in a line, and measured again.
    let ran = machine.runs(&[TWO], &[("FAKE_GPU_REFUSE", "1")]);
    assert!(
        ran.said.contains("the library refuses the kept choice"),
        "{}",
        ran.said
    );
    fs::write(path, text.replacen("rows=1 ", "rows=3 ", 1)).expect("writable");
    let ran = machine.runs(&[TWO], &[]);
    let told = ran.said.lines().filter(|line| line.contains("it is damaged"));
    assert_eq!(told.count(), 1, "{}", ran.said);
    let again = machine.choices();
    assert_eq!(again.len(), 1);
    assert_eq!(again[0].1.lines().count(), text.lines().count());
}

#[test]
fn a_start_is_measured_without_and_with_what_was_kept() {
    let machine = Machine::new();
    let ran = machine.bench(&["--startup=cold"], &[]);
    assert!(ran.ok, "{}", ran.said);
    let starts = ran.lines.iter().filter(|line| line["measured"] == "startup");
    let kept: Vec<_> = starts.map(|line| &line["kept"]).collect();
    assert_eq!(kept, ["nothing", "kernels", "choices"]);
}

#[test]
fn a_kernel_that_fails_is_named_when_it_is_looked_for() {
    let machine = Machine::new();
    // Two layers of the step that warms up, then one of the first step.
    let fault = [("FAKE_GPU_FAULT", "rope_write:3")];
    for ranks in ["--tensor-parallel=1", TWO] {
        let error = machine.fails(&[ranks, "--no-recordings"], &fault);
        for words in [
            "rank ",
            "a kernel before attend_",
            "CUDA_ERROR_ILLEGAL_ADDRESS",
            "in step 1 (launched kernel by kernel; 64 rows",
            "--debug-kernels names it",
        ] {
            assert!(error.contains(words), "{words:?} is not in: {error}");
        }
        let error = machine.fails(&[ranks, "--debug-kernels"], &fault);
        assert!(
            error.contains("failed (rope_write: CUDA_ERROR_ILLEGAL_ADDRESS") && error.ends_with("in step 1"),
            "{error}"
        );
    }
}

/// A rank that waits on its GPU for one that has failed: the group ends, and says who failed.
#[test]
fn a_rank_that_fails_does_not_hold_up_the_others() {
    let machine = Machine::new();
    // Five sums a step; the seventh is in the first step after the warm-up.
    let error = machine.fails(&[TWO, "--no-recordings"], &[("FAKE_GPU_HANG", "7")]);
    assert!(
        error.contains("rank 1 failed (ncclAllReduce: ") && error.ends_with("in step 1"),
        "{error}"
    );
}

#[test]
fn steps_are_recorded_and_chained_where_they_should_be() {
    let machine = Machine::new();
    let one = machine.runs(&[], &[]);
    assert!(one.count("chained") > 0 && one.count("recordings") > 0 && one.count("replays") > 0);
    assert_eq!(one.count("groups"), 0);
    assert_eq!(machine.runs(&["--chain-kernels=off"], &[]).count("chained"), 0);
    let two = machine.runs(&[TWO], &[]);
    assert_eq!(
        (two.count("chained"), two.count("groups"), two.count("left")),
        (0, 2, 2)
    );
    assert!(
        two.count("recordings") > 0 && two.count("replays") > 0,
        "{}",
        two.said
    );
    let chained = machine.runs(&[TWO, "--chain-kernels=on"], &[]);
    assert!(chained.count("chained") > 0 && chained.count("replays") > 0);
    let alone = machine.runs(&[TWO, "--rank-alone"], &[]);
    assert_eq!(
        (alone.count("chained"), alone.count("groups")),
        (0, 0),
        "as in the group"
    );
    assert!(alone.count("replays") > 0);
    for flag in ["--no-recordings", "--debug-kernels"] {
        assert_eq!(machine.runs(&[flag], &[]).count("recordings"), 0, "{flag}");
    }
}
