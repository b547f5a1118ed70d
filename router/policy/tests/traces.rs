//! Scripted worlds and what is chosen in them, as text that is read like prose: commands, and below each one, after
//! `>`, what came of it. With BLESS=1 in the environment the answers are written anew.

use std::{collections::BTreeMap, fmt::Write as _, fs, path::Path, time::Duration};

use swallow_policy::{Ask, Capacity, Ending, Fleet, Keys, Load, ReplicaId, Ticket, choose};

const BLOCK: u32 = 16;

#[derive(Default)]
struct World {
    fleet: Fleet,
    now: Duration,
    names: Vec<String>,
    capacities: Vec<Capacity>,
    credits: Vec<u32>,
    tickets: BTreeMap<String, Vec<Ticket>>,
}

/// A prompt is written as segments, `sys:48+q1:20`: so many tokens of what is called so.
fn prompt(text: &str) -> (u32, Vec<u64>) {
    let tokens: Vec<(&str, u32)> = text
        .split('+')
        .flat_map(|segment| {
            let (name, n) = segment.split_once(':').expect("NAME:TOKENS");
            (0..n.parse().expect("a number")).map(move |i| (name, i))
        })
        .collect();
    let mut parent = 0x9e37_79b9_7f4a_7c15u64;
    let keys = tokens.chunks_exact(BLOCK as usize).map(|block| {
        for (name, i) in block {
            for byte in name.bytes().chain(i.to_le_bytes()) {
                parent = (parent ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
            }
        }
        parent
    });
    let keys = keys.collect();
    (u32::try_from(tokens.len()).expect("small"), keys)
}

/// `key=value` words of a command.
fn number(words: &[&str], key: &str, default: u32) -> u32 {
    let found = words
        .iter()
        .find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
    found.map_or(default, |value| {
        value.parse().unwrap_or_else(|_| panic!("{key}={value}"))
    })
}

impl World {
    fn id(&self, name: &str) -> ReplicaId {
        let index = self
            .names
            .iter()
            .position(|known| known == name)
            .unwrap_or_else(|| panic!("replica {name}?"));
        ReplicaId(u32::try_from(index).expect("few"))
    }

    fn connect(&mut self, name: &str, boot: &str) {
        let id = self.id(name);
        let index = id.0 as usize;
        self.fleet.connected(
            id,
            self.capacities[index].clone(),
            boot.as_bytes(),
            self.credits[index],
        );
        self.fleet.ready(id);
    }

    fn run(&mut self, line: &str) -> String {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (command, words) = words.split_first().expect("not empty");
        match (*command, words) {
            ("at", [seconds]) => {
                self.now = Duration::from_secs_f64(seconds.parse().expect("seconds"));
                String::new()
            }
            ("replica", [name, options @ ..]) => {
                self.names.push((*name).to_owned());
                self.capacities.push(Capacity {
                    max_step_tokens: number(options, "step", 512),
                    block_tokens: BLOCK,
                    n_blocks: number(options, "blocks", 10_000),
                    prefill_tokens_per_second: number(options, "rate", 10_000),
                });
                self.credits.push(number(options, "credits", 100));
                self.fleet.add(self.id(name));
                self.connect(name, "first boot");
                String::new()
            }
            ("ask", [request, segments, options @ ..]) => self.ask(request, segments, options),
            ("accepted", [request, cached]) => {
                self.each(request, |ticket| ticket.accepted(cached.parse().expect("tokens")))
            }
            ("tokens", [request, n]) => {
                self.each(request, |ticket| ticket.tokens(n.parse().expect("tokens")))
            }
            ("ends", [request, how]) => {
                let ending = match *how {
                    "failed" => Ending::Failed,
                    "neutral" => Ending::Neutral,
                    n => Ending::Well {
                        tokens: n.parse().expect("failed, neutral or a number of tokens"),
                    },
                };
                for ticket in self
                    .tickets
                    .remove(*request)
                    .unwrap_or_else(|| panic!("request {request}?"))
                {
                    self.fleet.grant(ticket.replica(), 1);
                    self.fleet.finish(ticket, ending, self.now, 0);
                }
                String::new()
            }
            ("report", [name, options @ ..]) => {
                let load = Load {
                    running: number(options, "running", 0),
                    waiting: number(options, "waiting", 0),
                    pending_prefill_tokens: number(options, "pending", 0),
                };
                self.fleet.report(self.id(name), load);
                String::new()
            }
            ("stored", [name, segments]) => {
                self.fleet.stored(self.id(name), false, &prompt(segments).1);
                String::new()
            }
            ("evicted", [name, segments]) => {
                self.fleet.evicted(self.id(name), &prompt(segments).1);
                String::new()
            }
            ("drains", [name]) => {
                self.fleet.draining(self.id(name));
                String::new()
            }
            ("lost", [name]) => {
                self.fleet.failed(self.id(name), self.now, 0);
                self.fleet.down(self.id(name));
                String::new()
            }
            ("back", [name, boot]) => {
                self.connect(name, boot);
                String::new()
            }
            ("fleet", []) => self.show(),
            _ => panic!("no such command: {line}"),
        }
    }

    fn ask(&mut self, request: &str, segments: &str, options: &[&str]) -> String {
        let (prompt_tokens, keys) = prompt(segments);
        let keys = [Keys {
            block_tokens: BLOCK,
            keys,
        }];
        let excluded: Vec<ReplicaId> = options
            .iter()
            .find_map(|word| word.strip_prefix("not="))
            .map(|names| names.split(',').map(|name| self.id(name)).collect())
            .unwrap_or_default();
        let ask = Ask {
            prompt_tokens,
            max_tokens: number(options, "out", 100),
            candidates: number(options, "n", 1),
            keys: &keys,
            excluded: &excluded,
        };
        match choose(&self.fleet, &ask, self.now, number(options, "draw", 0).into()) {
            Err(blocked) => format!("> {request} waits: {blocked:?}\n"),
            Ok(choice) => {
                let tickets = self.fleet.place(&choice, &ask);
                assert!(
                    self.tickets.insert(request.to_owned(), tickets).is_none(),
                    "{request} is taken"
                );
                let name = &self.names[choice.replica.0 as usize];
                let why = choice.why.to_string();
                let why = (0..self.names.len()).fold(why, |why, i| {
                    why.replace(&format!("from {i},"), &format!("from {},", self.names[i]))
                });
                format!(
                    "> {request} goes to {name}: {why}, {} of {prompt_tokens} tokens cached\n",
                    choice.cached_tokens
                )
            }
        }
    }

    fn each(&mut self, request: &str, change: impl Fn(&mut Ticket) -> swallow_policy::Delta) -> String {
        for ticket in self
            .tickets
            .get_mut(request)
            .unwrap_or_else(|| panic!("request {request}?"))
        {
            let delta = change(ticket);
            self.fleet.settle(ticket.replica(), delta);
        }
        String::new()
    }

    fn show(&self) -> String {
        let mut text = String::new();
        for (id, replica) in self.fleet.replicas() {
            let work = replica.work();
            writeln!(
                text,
                "> {}: {} tokens outstanding ({} waiting, {} running, {} decode), {} requests, {} credits",
                self.names[id.0 as usize],
                replica.outstanding(self.fleet.expected_output(u32::MAX)),
                work.waiting_prefill,
                work.running_prefill,
                work.decode,
                work.requests,
                replica.credits()
            )
            .expect("a string takes all");
        }
        text
    }
}

fn check(name: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/traces")
        .join(name);
    let written = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mut world = World::default();
    let mut told = String::new();
    for line in written.lines().filter(|line| !line.starts_with('>')) {
        writeln!(told, "{line}").expect("a string takes all");
        if !line.is_empty() && !line.starts_with('#') {
            told.push_str(&world.run(line));
        }
    }
    if std::env::var_os("BLESS").is_some() {
        fs::write(&path, told).expect("the trace can be written");
    } else if told != written {
        let differs = told.lines().zip(written.lines()).position(|(a, b)| a != b);
        panic!(
            "{name} differs from line {:?} on; it is now:\n{told}",
            differs.map(|line| line + 1)
        );
    }
}

#[test]
fn affinity() {
    check("affinity.txt");
}

#[test]
fn spill() {
    check("spill.txt");
}

#[test]
fn health() {
    check("health.txt");
}

#[test]
fn load_reports() {
    check("load_reports.txt");
}

#[test]
fn candidates_and_credits() {
    check("candidates_and_credits.txt");
}
