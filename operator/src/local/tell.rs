//! What the user sees: lines on standard output, and on a terminal a bar for each group that is on its way.

use std::{
    collections::BTreeMap,
    io::{self, IsTerminal, Write},
    time::{Duration, Instant},
};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use swallow_plan::{
    Note,
    memory::Size,
    model::{GroupState, GroupStatus, SwallowModel},
};

use crate::file::model_name;

/// Without a terminal, progress is a line in this interval.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// Tells what happens.
pub struct Teller {
    bars: Option<MultiProgress>,
    groups: BTreeMap<String, Shown>,
}

/// What was last told of a group on its way.
struct Shown {
    bar: Option<ProgressBar>,
    state: GroupState,
    told: Instant,
}

impl Teller {
    /// Draws bars if both outputs are a terminal.
    pub fn new() -> Self {
        let terminal = io::stdout().is_terminal() && io::stderr().is_terminal();
        let bars = terminal.then(|| MultiProgress::with_draw_target(ProgressDrawTarget::stderr()));
        Self {
            bars,
            groups: BTreeMap::new(),
        }
    }

    /// Says a line, above the bars.
    pub fn line(&self, line: &str) {
        // Whoever does not listen any more is not told; serving goes on.
        let say = || {
            let mut out = io::stdout().lock();
            let _ = writeln!(out, "{line}").and_then(|()| out.flush());
        };
        match &self.bars {
            Some(bars) => bars.suspend(say),
            None => say(),
        }
    }

    /// Says what changed.
    pub fn note(&self, model: &SwallowModel, note: &Note) {
        self.line(&format!("{}: {note}", model_name(model)));
    }

    /// Shows how far groups are.
    pub fn groups(&mut self, groups: &[GroupStatus]) {
        for group in groups {
            match group.state {
                GroupState::Pending | GroupState::Fetching | GroupState::Loading | GroupState::Warming => {
                    self.progress(group);
                }
                _ => self.done(&group.name),
            }
        }
    }

    /// Takes all bars away.
    pub fn clear(&mut self) {
        let names: Vec<String> = self.groups.keys().cloned().collect();
        names.iter().for_each(|name| self.done(name));
    }

    fn progress(&mut self, group: &GroupStatus) {
        let first = !self.groups.contains_key(&group.name);
        let shown = self.groups.entry(group.name.clone()).or_insert_with(|| Shown {
            bar: self.bars.as_ref().map(|bars| bars.add(bar(&group.name))),
            state: group.state,
            told: Instant::now(),
        });
        let text = in_words(group);
        if let Some(bar) = &shown.bar {
            if let Some(progress) = group.progress.filter(|progress| progress.bytes_total > 0) {
                bar.set_length(progress.bytes_total.unsigned_abs());
                bar.set_position(progress.bytes_done.unsigned_abs());
            }
            bar.set_message(text);
        } else if (!first && shown.state != group.state) || shown.told.elapsed() >= LINE_EVERY {
            shown.told = Instant::now();
            shown.state = group.state;
            self.line(&format!("{}: {text}", group.name));
        }
    }

    fn done(&mut self, name: &str) {
        if let Some(Shown { bar: Some(bar), .. }) = self.groups.remove(name) {
            bar.finish_and_clear();
            if let Some(bars) = &self.bars {
                bars.remove(&bar);
            }
        }
    }
}

fn bar(name: &str) -> ProgressBar {
    let style = ProgressStyle::with_template("{spinner} {prefix} {bar:24} {msg}")
        .expect("the template is well formed");
    let bar = ProgressBar::new(0).with_style(style).with_prefix(name.to_owned());
    bar.enable_steady_tick(Duration::from_millis(120));
    bar
}

fn in_words(group: &GroupStatus) -> String {
    let what = match group.state {
        GroupState::Fetching => "fetching",
        GroupState::Loading => "loading",
        GroupState::Warming => "warming up",
        _ => "starting",
    };
    let Some(progress) = group.progress.filter(|progress| progress.bytes_total > 0) else {
        return what.to_owned();
    };
    let size = |bytes: i64| Size(bytes.unsigned_abs());
    let eta = progress
        .eta_seconds
        .map_or_else(String::new, |seconds| format!(", {seconds} s left"));
    format!(
        "{what} {} of {}{eta}",
        size(progress.bytes_done),
        size(progress.bytes_total)
    )
}
