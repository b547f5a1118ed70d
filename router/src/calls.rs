//! Calls in an answer's text, as Llama 3 writes them, found while the text comes.
//!
//! A call is a JSON object with `name` and `parameters` (or `arguments`), alone or several after one another, with or
//! without `<|python_tag|>` before them; after the tag it may also be `name.call(key="value")`. Text is withheld only
//! while it may still be the beginning of a call of a known name; what turns out to be none is text, whole.

use serde_json::{Map, Value};
use uuid::Uuid;

/// The text of the token with which Llama 3 marks calls.
pub(crate) const TAG: &str = "<|python_tag|>";

/// What models write between calls.
const BETWEEN: &[char] = &[' ', '\n', '\t', '\r', ';', ','];

/// What came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Heard {
    Text(String),
    /// A call of this function begins, the next after those before.
    Call(String),
    /// More of the JSON text of its arguments.
    Arguments(String),
}

/// A whole call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Call {
    pub(crate) id: String,
    pub(crate) name: String,
    /// JSON.
    pub(crate) arguments: String,
}

/// A name for a call that nobody else has.
pub(crate) fn new_id() -> String {
    format!("call_{}", Uuid::new_v4().simple())
}

/// Reads one answer.
#[derive(Debug)]
pub(crate) struct Calls {
    names: Vec<String>,
    /// Calls that are told; further ones are dropped.
    most: usize,
    /// Text that is not told yet, and what is before it if it is no call.
    held: String,
    lead: String,
    state: State,
    n_calls: usize,
}

#[derive(Debug)]
enum State {
    /// A call may begin here: at the answer's beginning, or behind another call.
    Between { tagged: bool },
    /// In an object.
    Object(Object),
    /// Behind the tag, and not in an object.
    Python,
    /// The rest is text.
    Text,
}

/// A JSON object as far as it came. Positions are in `held`, where it begins at 0.
#[derive(Debug, Default)]
struct Object {
    /// How much was looked at.
    at: usize,
    depth: usize,
    in_string: bool,
    escaped: bool,
    /// Of the present key, or of the present value.
    begin: usize,
    key: Option<String>,
    name: Option<String>,
    /// Where the arguments begin, and where they end.
    arguments: Option<(usize, Option<usize>)>,
    /// How much of them was told.
    told: usize,
    /// Begun to be told.
    is_call: bool,
}

/// What an object turned out to be.
enum Step {
    More,
    NoCall,
    /// It ended at this position.
    End(usize),
}

impl Calls {
    /// Of these functions; so many at most.
    pub(crate) fn new(names: &[String], most: usize) -> Self {
        Self {
            names: names.to_vec(),
            most,
            held: String::new(),
            lead: String::new(),
            state: State::Between { tagged: false },
            n_calls: 0,
        }
    }

    /// Calls so far.
    pub(crate) fn n_calls(&self) -> usize {
        self.n_calls.min(self.most)
    }

    /// The text of a whole answer without its calls, and these.
    pub(crate) fn split(mut self, text: &str) -> (String, Vec<Call>) {
        let mut heard = self.push(text);
        heard.extend(self.finish());
        let (mut rest, mut found) = (String::new(), Vec::<Call>::new());
        for what in heard {
            match (what, found.last_mut()) {
                (Heard::Text(more), _) => rest += &more,
                (Heard::Call(name), _) => found.push(Call {
                    id: new_id(),
                    name,
                    arguments: String::new(),
                }),
                (Heard::Arguments(more), Some(call)) => call.arguments += &more,
                (Heard::Arguments(_), None) => unreachable!("a call begins with its name"),
            }
        }
        (rest, found)
    }

    /// More text.
    pub(crate) fn push(&mut self, text: &str) -> Vec<Heard> {
        self.held.push_str(text);
        let mut heard = Vec::new();
        while self.step(&mut heard) {}
        heard
    }

    /// There is no more.
    pub(crate) fn finish(&mut self) -> Vec<Heard> {
        let mut heard = Vec::new();
        match std::mem::replace(&mut self.state, State::Text) {
            State::Python => match python(&self.held, &self.names) {
                Some((name, arguments)) => {
                    self.begin(&name, &mut heard);
                    self.tell(Heard::Arguments(arguments), &mut heard);
                    self.held.clear();
                }
                None => self.as_text(&mut heard),
            },
            // An answer that was cut in the middle of a call.
            State::Object(object) if object.is_call => self.held.clear(),
            State::Between { .. } if self.n_calls > 0 && self.held.trim_matches(BETWEEN).is_empty() => {
                self.held.clear();
            }
            _ => self.as_text(&mut heard),
        }
        heard
    }

    /// Whether there may be more to do.
    fn step(&mut self, heard: &mut Vec<Heard>) -> bool {
        match &mut self.state {
            State::Text => {
                self.as_text(heard);
                false
            }
            State::Python => false,
            State::Between { tagged } => {
                let rest = match self.n_calls {
                    0 => self.held.trim_start(),
                    _ => self.held.trim_start_matches(BETWEEN),
                };
                if rest.is_empty() || (TAG.starts_with(rest) && rest.len() < TAG.len()) {
                    return false;
                }
                if let Some(behind) = rest.strip_prefix(TAG) {
                    self.held = behind.to_owned();
                    *tagged = true;
                } else if rest.starts_with('{') {
                    let object = self.held.len() - rest.len();
                    let object = self.held.split_off(object);
                    self.lead = std::mem::replace(&mut self.held, object);
                    self.state = State::Object(Object::default());
                } else {
                    self.state = if *tagged { State::Python } else { State::Text };
                }
                true
            }
            State::Object(object) => {
                let step = object.read(&self.held, &self.names);
                let ended = matches!(step, Step::End(_));
                let begins = match &object.name {
                    Some(name) if !object.is_call && (ended || object.has_arguments(&self.held)) => {
                        Some(name.clone())
                    }
                    _ => None,
                };
                object.is_call |= begins.is_some();
                let arguments = object.untold(&self.held, ended);
                if let Some(name) = begins {
                    self.lead.clear();
                    self.begin(&name, heard);
                }
                if let Some(arguments) = arguments {
                    self.tell(Heard::Arguments(arguments), heard);
                }
                match step {
                    Step::More => false,
                    Step::NoCall => {
                        self.state = State::Text;
                        true
                    }
                    Step::End(at) => {
                        self.held = self.held.split_off(at);
                        self.state = State::Between { tagged: false };
                        true
                    }
                }
            }
        }
    }

    fn begin(&mut self, name: &str, heard: &mut Vec<Heard>) {
        self.n_calls += 1;
        self.tell(Heard::Call(name.to_owned()), heard);
    }

    fn tell(&self, what: Heard, heard: &mut Vec<Heard>) {
        if self.n_calls <= self.most {
            heard.push(what);
        }
    }

    fn as_text(&mut self, heard: &mut Vec<Heard>) {
        let text = std::mem::take(&mut self.lead) + &std::mem::take(&mut self.held);
        if !text.is_empty() {
            heard.push(Heard::Text(text));
        }
    }
}

impl Object {
    /// Reads on in `text`.
    fn read(&mut self, text: &str, names: &[String]) -> Step {
        let bytes = text.as_bytes();
        while let Some(&byte) = bytes.get(self.at) {
            let here = self.at;
            self.at += 1;
            if self.in_string {
                match byte {
                    _ if self.escaped => self.escaped = false,
                    b'\\' => self.escaped = true,
                    b'"' => self.in_string = false,
                    _ => {}
                }
                continue;
            }
            match byte {
                b'"' => self.in_string = true,
                b'{' | b'[' => self.depth += 1,
                b'}' | b']' if self.depth > 1 => self.depth -= 1,
                b':' if self.depth == 1 && self.key.is_none() => {
                    let key: Option<String> = serde_json::from_str(text[self.begin..here].trim()).ok();
                    match key.as_deref() {
                        Some("name" | "type" | "id" | "function") => {}
                        Some("parameters" | "arguments") => self.arguments = Some((self.at, None)),
                        // What else a call may have is of no use here.
                        _ if self.is_call => {}
                        _ => return Step::NoCall,
                    }
                    (self.key, self.begin) = (key, self.at);
                    continue;
                }
                b',' | b'}' if self.depth == 1 => {
                    if !self.value(&text[self.begin..here], here, names) {
                        return Step::NoCall;
                    }
                    self.begin = self.at;
                    if byte == b'}' {
                        return if self.name.is_some() {
                            Step::End(self.at)
                        } else {
                            Step::NoCall
                        };
                    }
                }
                _ => {}
            }
            if self.depth == 1 && here == 0 {
                self.begin = self.at;
            }
        }
        Step::More
    }

    /// A field's value is whole. False: this is no call.
    fn value(&mut self, raw: &str, end: usize, names: &[String]) -> bool {
        match self.key.take().as_deref() {
            Some("name" | "function") => {
                let name: Option<String> = serde_json::from_str(raw.trim()).ok();
                self.name = name.filter(|name| names.contains(name));
                self.name.is_some()
            }
            Some("parameters" | "arguments") => {
                let whole = serde_json::from_str::<Value>(raw.trim());
                self.arguments = self.arguments.map(|(begin, _)| (begin, Some(end)));
                // What was told can't be taken back: arguments are then as good as the model made them.
                self.is_call || whole.is_ok_and(|value| value.is_object() || value.is_string())
            }
            // Of no use here.
            Some(_) => true,
            // An empty object, or a comma too much.
            None => self.is_call,
        }
    }

    /// They have begun, as an object or as a text that holds one.
    fn has_arguments(&self, text: &str) -> bool {
        let raw = self.arguments.map(|(begin, _)| text[begin..self.at].trim_start());
        raw.is_some_and(|raw| raw.starts_with(['{', '"']))
    }

    /// Arguments that can be told: as they come, once the function is known.
    fn untold(&mut self, text: &str, ended: bool) -> Option<String> {
        if !self.is_call {
            return None;
        }
        let Some((begin, end)) = self.arguments else {
            return ended.then(|| "{}".to_owned());
        };
        let value = text[begin..end.unwrap_or(self.at)].trim();
        if value.starts_with('"') {
            // JSON within a text is told when it is whole.
            let inner: Option<String> = end.and_then(|_| serde_json::from_str(value).ok());
            return inner.filter(|inner| !inner.is_empty() && std::mem::replace(&mut self.told, 1) == 0);
        }
        let new = value.get(self.told..).filter(|new| !new.is_empty())?;
        self.told = value.len();
        Some(new.to_owned())
    }
}

/// `name.call(key="value", ...)`, with values as JSON or Python has them.
fn python(text: &str, names: &[String]) -> Option<(String, String)> {
    let (name, rest) = text.trim().split_once(".call(")?;
    let mut rest = rest.strip_suffix(')')?.trim();
    let mut arguments = Map::new();
    while !rest.is_empty() {
        let (key, after) = rest.split_once('=')?;
        let mut values = serde_json::Deserializer::from_str(after).into_iter::<Value>();
        let (value, used) = match values.next() {
            Some(Ok(value)) => (value, values.byte_offset()),
            _ => word(after)?,
        };
        arguments.insert(key.trim().to_owned(), value);
        rest = after[used..].trim_start();
        rest = match rest.strip_prefix(',') {
            Some(more) => more.trim_start(),
            None if rest.is_empty() => rest,
            None => return None,
        };
    }
    let known = names.iter().any(|known| known == name);
    known.then(|| (name.to_owned(), Value::Object(arguments).to_string()))
}

/// A value that is not JSON: a Python word, or a text in single quotes without any inside.
fn word(text: &str) -> Option<(Value, usize)> {
    for (word, value) in [
        ("True", Value::Bool(true)),
        ("False", Value::Bool(false)),
        ("None", Value::Null),
    ] {
        if text.starts_with(word) {
            return Some((value, word.len()));
        }
    }
    let inner = text.strip_prefix('\'')?;
    let end = inner.find('\'').filter(|&end| !inner[..end].contains('\\'))?;
    Some((inner[..end].into(), end + 2))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names() -> Vec<String> {
        ["look", "now"].map(str::to_owned).to_vec()
    }

    /// Calls with their arguments, and the text beside them.
    fn hear(parts: &[&str], most: usize) -> (Vec<(String, String)>, String) {
        let mut calls = Calls::new(&names(), most);
        let mut heard: Vec<Heard> = parts.iter().flat_map(|part| calls.push(part)).collect();
        heard.extend(calls.finish());
        let (mut found, mut text) = (Vec::<(String, String)>::new(), String::new());
        for what in heard {
            match what {
                Heard::Text(more) => text += &more,
                Heard::Call(name) => found.push((name, String::new())),
                Heard::Arguments(more) => found.last_mut().expect("a call before its arguments").1 += &more,
            }
        }
        assert_eq!(found.len(), calls.n_calls());
        (found, text)
    }

    /// However the text is cut.
    fn whole(text: &str) -> (Vec<(String, String)>, String) {
        let all = hear(&[text], 9);
        let chars: Vec<String> = text.chars().map(String::from).collect();
        let parts: Vec<&str> = chars.iter().map(String::as_str).collect();
        assert_eq!(hear(&parts, 9), all, "{text}");
        for at in (0..text.len()).filter(|&at| text.is_char_boundary(at)) {
            assert_eq!(hear(&[&text[..at], &text[at..]], 9), all, "{text}");
        }
        all
    }

    #[test]
    fn calls_are_found_in_every_form() {
        let look = |arguments: &str| ("look".to_owned(), arguments.to_owned());
        let now = ("now".to_owned(), "{}".to_owned());
        for (text, expected) in [
            (
                r#"{"name": "look", "parameters": {"at": "東京 \"}\"", "n": [1, {}]}}"#,
                vec![look(r#"{"at": "東京 \"}\"", "n": [1, {}]}"#)],
            ),
            (
                r#" {"type":"function","name":"look","arguments":{"a":1}} "#,
                vec![look(r#"{"a":1}"#)],
            ),
            (
                r#"{"parameters": {"a": 1}, "name": "look"}"#,
                vec![look(r#"{"a": 1}"#)],
            ),
            (
                r#"<|python_tag|>{"name": "look", "parameters": {}}; {"name": "now"}"#,
                vec![look("{}"), now.clone()],
            ),
            (
                r#"{"name": "now", "parameters": {}}
{"name": "look", "parameters": {"a": null}}"#,
                vec![now.clone(), look(r#"{"a": null}"#)],
            ),
            (
                r#"{"name": "look", "arguments": "{\"a\": 2}"}"#,
                vec![look(r#"{"a": 2}"#)],
            ),
            (
                r#"<|python_tag|>look.call(at="東京", n=3, deep=True, by='x')"#,
                vec![look(r#"{"at":"東京","n":3,"deep":true,"by":"x"}"#)],
            ),
            ("<|python_tag|>now.call()", vec![now]),
        ] {
            assert_eq!(whole(text), (expected, String::new()), "{text}");
        }
    }

    #[test]
    fn what_is_no_call_is_text_to_the_last_character() {
        for text in [
            "Hello {\"name\": \"look\"}",
            r#"{"name": "unknown", "parameters": {}}"#,
            r#"{"answer": 42}"#,
            r#"{"name": "look""#,
            r#"{"name": ["look"], "parameters": {}}"#,
            r#"{"parameters": {}}"#,
            r#"{"name": "look", "parameters": 3}"#,
            " \n{\"a\": 1} b",
            "{}",
            "{",
            "<|python",
            "",
            "   ",
        ] {
            assert_eq!(whole(text), (vec![], text.to_owned()), "{text}");
        }
        assert_eq!(whole("<|python_tag|>print(1)"), (vec![], "print(1)".to_owned()));
        let (calls, text) = whole(r#"{"name": "now", "parameters": {}} That was it."#);
        assert_eq!((calls.len(), text.trim()), (1, "That was it."));
    }

    #[test]
    fn arguments_stream_and_a_cut_answer_keeps_what_came() {
        let mut calls = Calls::new(&names(), 9);
        assert_eq!(calls.push("{\"name\": \"lo"), []);
        assert_eq!(calls.push("ok\", \"parameters\""), []);
        let begun = [
            Heard::Call("look".into()),
            Heard::Arguments("{\"a\": \"long".into()),
        ];
        assert_eq!(calls.push(": {\"a\": \"long"), begun);
        assert_eq!(calls.push(" text"), [Heard::Arguments(" text".into())]);
        assert_eq!(calls.finish(), []);
        let two = r#"{"name": "now", "parameters": {}}; {"name": "look", "parameters": {}}"#;
        assert_eq!(
            hear(&[two], 1),
            (vec![("now".into(), "{}".into())], String::new())
        );
    }
}
