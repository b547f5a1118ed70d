//! Stop strings, found while the text is still arriving.
//!
//! The match that is complete first wins; of two that end together, the longer. Text is withheld only while it is
//! the beginning of a stop string, so nothing waits that need not, and nothing of a stop string is ever shown.
//! One pass, whatever the number of strings: an automaton over bytes with failure links (Aho and Corasick, 1975).

use std::collections::VecDeque;

const ROOT: u32 = 0;

/// A prefix of some stop string.
#[derive(Clone, Debug, Default, PartialEq)]
struct Node {
    /// Sorted by byte.
    next: Vec<(u8, u32)>,
    /// The longest proper suffix that is also a node.
    fail: u32,
    /// Length of the prefix in bytes.
    depth: u32,
    /// The longest stop string that ends here, by its place in the request.
    ends: Option<u32>,
}

/// The stop strings of one request, shared by its prompts and candidates.
#[derive(Clone, Debug, PartialEq)]
pub struct StopSet {
    nodes: Vec<Node>,
    strings: Vec<String>,
}

impl StopSet {
    /// Empty strings match nothing.
    pub fn new(strings: Vec<String>) -> Self {
        let mut nodes = vec![Node::default()];
        for (which, string) in strings
            .iter()
            .enumerate()
            .filter(|(_, string)| !string.is_empty())
        {
            let mut at = ROOT;
            for byte in string.bytes() {
                at = child_or_new(&mut nodes, at, byte);
            }
            let end = &mut nodes[at as usize].ends;
            *end = end.or(Some(which as u32));
        }
        link(&mut nodes);
        Self { nodes, strings }
    }

    /// No string can match.
    pub fn is_empty(&self) -> bool {
        self.nodes.len() == 1
    }

    /// About what it takes in memory.
    pub fn bytes(&self) -> usize {
        let edges: usize = self.nodes.iter().map(|node| node.next.capacity()).sum();
        let strings: usize = self.strings.iter().map(String::capacity).sum();
        self.nodes.capacity() * size_of::<Node>() + edges * size_of::<(u8, u32)>() + strings
    }

    /// The strings in the request's order.
    pub fn strings(&self) -> &[String] {
        &self.strings
    }

    fn step(&self, mut at: u32, byte: u8) -> u32 {
        loop {
            match child(&self.nodes, at, byte) {
                Some(next) => return next,
                None if at == ROOT => return ROOT,
                None => at = self.nodes[at as usize].fail,
            }
        }
    }
}

fn child(nodes: &[Node], at: u32, byte: u8) -> Option<u32> {
    let next = &nodes[at as usize].next;
    next.binary_search_by_key(&byte, |&(byte, _)| byte)
        .ok()
        .map(|i| next[i].1)
}

fn child_or_new(nodes: &mut Vec<Node>, at: u32, byte: u8) -> u32 {
    let new = nodes.len() as u32;
    let parent = &mut nodes[at as usize];
    match parent.next.binary_search_by_key(&byte, |&(byte, _)| byte) {
        Ok(i) => parent.next[i].1,
        Err(i) => {
            parent.next.insert(i, (byte, new));
            let depth = parent.depth + 1;
            nodes.push(Node {
                depth,
                ..Node::default()
            });
            new
        }
    }
}

/// Breadth first, so that a node's failure link is known before its children's.
fn link(nodes: &mut [Node]) {
    let mut queue: VecDeque<u32> = nodes[ROOT as usize].next.iter().map(|&(_, node)| node).collect();
    while let Some(at) = queue.pop_front() {
        for (byte, next) in nodes[at as usize].next.clone() {
            let mut fail = nodes[at as usize].fail;
            let target = loop {
                match child(nodes, fail, byte) {
                    Some(target) => break target,
                    None if fail == ROOT => break ROOT,
                    None => fail = nodes[fail as usize].fail,
                }
            };
            nodes[next as usize].fail = target;
            // A shorter string that ends here counts only where no longer one does.
            nodes[next as usize].ends = nodes[next as usize].ends.or(nodes[target as usize].ends);
            queue.push_back(next);
        }
    }
}

/// Where one candidate's text stands in its request's `StopSet`.
#[derive(Clone, Debug, Default)]
pub struct StopCursor {
    at: u32,
    /// The text that the state stands for: the beginning of a stop string.
    held: String,
}

impl StopCursor {
    /// Reads `text`; what can't be part of a match any more is appended to `out`. On a match returns which string,
    /// having appended all text before it, and the string itself if `include`; the cursor must not be used again.
    pub fn push(&mut self, set: &StopSet, text: &str, include: bool, out: &mut String) -> Option<usize> {
        if set.is_empty() {
            out.push_str(text);
            return None;
        }
        for (i, byte) in text.bytes().enumerate() {
            self.at = set.step(self.at, byte);
            if let Some(which) = set.nodes[self.at as usize].ends {
                let which = which as usize;
                self.held.push_str(&text[..=i]);
                let keep = self.held.len() - if include { 0 } else { set.strings[which].len() };
                out.push_str(&self.held[..keep]);
                return Some(which);
            }
        }
        self.hold(set, text, out);
        None
    }

    /// Withholds of what was read that which may be the beginning of a stop string. None starts inside a code point, so
    /// neither does the withheld end of the text.
    fn hold(&mut self, set: &StopSet, text: &str, out: &mut String) {
        self.held.push_str(text);
        let free = self.held.len() - set.nodes[self.at as usize].depth as usize;
        out.push_str(&self.held[..free]);
        self.held.drain(..free);
    }

    /// Reads `text` in which no match counts; one that begins in it and ends behind it does.
    pub fn pass(&mut self, set: &StopSet, text: &str, out: &mut String) {
        for byte in text.bytes() {
            self.at = set.step(self.at, byte);
            // A whole stop string that no longer one goes on from is the beginning of nothing.
            while self.at != ROOT && set.nodes[self.at as usize].next.is_empty() {
                self.at = set.nodes[self.at as usize].fail;
            }
        }
        self.hold(set, text, out);
    }

    /// The text ended without a match: what was withheld is shown after all.
    pub fn finish(&mut self, out: &mut String) {
        out.push_str(&std::mem::take(&mut self.held));
        self.at = ROOT;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stops: &[&str], parts: &[&str]) -> (Vec<String>, Option<usize>) {
        let set = StopSet::new(stops.iter().map(ToString::to_string).collect());
        let mut cursor = StopCursor::default();
        let mut said = Vec::new();
        for part in parts {
            let mut out = String::new();
            let hit = cursor.push(&set, part, false, &mut out);
            said.push(out);
            if hit.is_some() {
                return (said, hit);
            }
        }
        let mut out = String::new();
        cursor.finish(&mut out);
        said.push(out);
        (said, None)
    }

    #[test]
    fn only_the_beginning_of_a_stop_string_waits() {
        assert_eq!(run(&["END"], &["a", "E", "N", "x"]).0, ["a", "", "", "ENx", ""]);
        assert_eq!(
            run(&["END"], &["aEEN", "D!"]),
            (vec!["aE".into(), String::new()], Some(0))
        );
        assert_eq!(run(&["END"], &["hello"]).0, ["hello", ""]);
    }

    #[test]
    fn first_complete_match_wins_and_of_equal_ends_the_longer() {
        assert_eq!(run(&["abcd", "bc"], &["xabcd"]), (vec!["xa".into()], Some(1)));
        assert_eq!(run(&["bc", "abc"], &["xabc"]), (vec!["x".into()], Some(1)));
        assert_eq!(run(&["", "x"], &["ax"]), (vec!["a".into()], Some(1)));
    }
}
