//! From a grammar's source to a place at its beginning. Sources that were compiled lately are kept: clients send the
//! same schema again and again.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use bytes::Bytes;
use llguidance::{
    Matcher, ParserFactory,
    api::{GrammarWithLexer, TopLevelGrammar},
};
use serde_json::{Value, json};

use super::{Constraint, GrammarError, Source, vocabulary};

/// Bytes of a source.
pub(super) const SOURCE_MAX: usize = 64 << 10;
/// Brackets within brackets in a source.
const NESTED_MAX: usize = 200;
/// Rules that name each other are compiled one inside of the other: some 1 kB for each, of which a source has room for ten
/// thousand. Only what is used of it is memory.
const STACK_BYTES: usize = 256 << 20;
/// Compiled grammars that are kept, used or not.
const KEPT_MAX: usize = 32;

/// Where a schema has llguidance's own options.
const OPTIONS: &str = "x-guidance";

/// A compiled grammar, or why it is none; who comes second waits for who came first.
type Slot = Arc<OnceLock<Result<Mutex<Matcher>, GrammarError>>>;

/// Compiles the grammars of one model.
pub struct Grammars {
    tokenizer: Bytes,
    n_vocab: u32,
    eos_token_ids: Arc<[u32]>,
    /// Made when the first grammar comes: most models never see one.
    factory: OnceLock<Result<ParserFactory, GrammarError>>,
    /// The latest last.
    kept: Mutex<Vec<(Source, Slot)>>,
}

impl std::fmt::Debug for Grammars {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Grammars")
    }
}

impl Grammars {
    /// For a model with this tokenizer.json, so many logits, and these ends. Nothing is read yet.
    pub fn new(tokenizer: Bytes, n_vocab: u32, eos_token_ids: Arc<[u32]>) -> Self {
        Self {
            tokenizer,
            n_vocab,
            eos_token_ids,
            factory: OnceLock::new(),
            kept: Mutex::default(),
        }
    }

    /// A place in the grammar behind the tokens `said`, which an output has already. Blocks: for the time of a
    /// compilation, and the first time for that of reading the vocabulary.
    ///
    /// # Errors
    /// The grammar is none, or beyond a bound; or `said` breaks it.
    pub fn constraint(&self, source: &Source, said: &[u32]) -> Result<Constraint, GrammarError> {
        let bytes = source.text().len();
        if bytes > SOURCE_MAX {
            return Err(GrammarError::TooLong { bytes });
        }
        let slot = self.slot(source);
        let matcher = slot
            .get_or_init(|| self.with_stack(source).map(Mutex::new))
            .as_ref()
            .map_err(Clone::clone)?;
        // Its own automata: what fails for one sequence fails for it alone.
        let own = locked(matcher).deep_clone();
        Constraint::new(own, said)
    }

    /// On a thread of its own, whose stack holds what a source can nest.
    fn with_stack(&self, source: &Source) -> Result<Matcher, GrammarError> {
        let nested = source.nested();
        if nested > NESTED_MAX {
            return Err(GrammarError::Unusable(format!(
                "it nests brackets {nested} deep; nest at most {NESTED_MAX}"
            )));
        }
        let failed = || GrammarError::Unusable("compiling it failed".into());
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new()
                .name("grammar".into())
                .stack_size(STACK_BYTES)
                .spawn_scoped(scope, || self.compile(source));
            let joined = thread.map(std::thread::ScopedJoinHandle::join);
            joined.map_err(|_| failed())?.map_err(|_| failed())?
        })
    }

    fn compile(&self, source: &Source) -> Result<Matcher, GrammarError> {
        let factory = self
            .factory
            .get_or_init(|| vocabulary::factory(&self.tokenizer, self.n_vocab, &self.eos_token_ids))
            .as_ref()
            .map_err(Clone::clone)?;
        let unusable = |error: &dyn std::fmt::Display| GrammarError::Unusable(one_line(&error.to_string()));
        let grammar = match source {
            Source::JsonSchema(schema) => {
                let mut schema = serde_json::from_str(schema).map_err(|error| unusable(&error))?;
                bound_space(&mut schema);
                GrammarWithLexer::from_json_schema(schema)
            }
            Source::Regex(regex) => GrammarWithLexer::from_regex(regex),
            Source::Lark(lark) => GrammarWithLexer::from_lark(lark.clone()),
        };
        let parser = factory
            .create_parser(TopLevelGrammar::from_grammar(grammar))
            .map_err(|error| unusable(&error))?;
        let mut matcher = Matcher::new(Ok(parser));
        // The first mask is the dearest, and tells whether the grammar is within the bounds of a step.
        matcher.compute_mask_or_eos().map_err(|error| unusable(&error))?;
        Ok(matcher)
    }

    fn slot(&self, source: &Source) -> Slot {
        let mut kept = locked(&self.kept);
        let slot = match kept.iter().position(|(known, _)| known == source) {
            Some(at) => kept.remove(at).1,
            None => Slot::default(),
        };
        if kept.len() >= KEPT_MAX {
            kept.remove(0);
        }
        kept.push((source.clone(), Arc::clone(&slot)));
        slot
    }
}

impl Source {
    fn text(&self) -> &str {
        match self {
            Self::JsonSchema(text) | Self::Regex(text) | Self::Lark(text) => text,
        }
    }
}

/// Between two tokens of JSON a model may write white space, but not for ever. A schema may say otherwise itself.
fn bound_space(schema: &mut Value) {
    if let Value::Object(fields) = schema
        && !fields.contains_key(OPTIONS)
    {
        let options = json!({"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,32}"});
        fields.insert(OPTIONS.to_owned(), options);
    }
}

impl Source {
    /// How deep brackets are within brackets, those in texts counted too.
    fn nested(&self) -> usize {
        let (mut depth, mut deepest) = (0_usize, 0);
        for byte in self.text().bytes() {
            match byte {
                b'(' | b'[' | b'{' => depth += 1,
                b')' | b']' | b'}' => depth = depth.saturating_sub(1),
                _ => {}
            }
            deepest = deepest.max(depth);
        }
        deepest
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The library's messages may end in a dump of its state.
pub(super) fn one_line(message: &str) -> String {
    const MAX: usize = 500;
    let message = message.split("\n<").next().unwrap_or_default();
    let line = message.split_whitespace().collect::<Vec<&str>>().join(" ");
    line.chars().take(MAX).collect()
}
