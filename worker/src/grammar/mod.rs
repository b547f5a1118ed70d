//! Grammars that outputs must follow, as sets of allowed tokens: a schema, a regular expression or a grammar in Lark's
//! notation is compiled once, and each sequence walks it token by token.
//!
//! The work is llguidance's; here it is bounded. A grammar has a size, compiling it and each mask have a measure of work,
//! automata have a number of states, and whatever is beyond is an error of that request alone. Compiling blocks for
//! milliseconds to seconds, so the engine's loop never does it: a request enters the loop with its place in its grammar.
//! Of the tokenizer only the vocabulary is read; no text passes through here.

mod compile;
mod constraint;
mod vocabulary;

pub use compile::Grammars;
pub use constraint::Constraint;

/// What an output must follow.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// A JSON schema, as JSON.
    JsonSchema(String),
    /// A regular expression in Rust's syntax; the whole output matches it.
    Regex(String),
    /// A grammar in llguidance's variant of Lark's notation, with a rule `start`.
    Lark(String),
}

/// Why an output can't be held to a grammar. The message says what to change.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GrammarError {
    /// Longer than is read.
    #[error("the grammar has {bytes} bytes; send at most {}", compile::SOURCE_MAX)]
    TooLong {
        /// Its length.
        bytes: usize,
    },
    /// It is none, or asks for what is not known or not bounded.
    #[error("the grammar can't be used: {0}")]
    Unusable(String),
    /// The model's tokens have no known bytes, or it has no end.
    #[error("this model's output can't be held to a grammar: {0}")]
    Model(String),
    /// The tokens that are to be continued break the grammar.
    #[error("the output that is to be continued does not follow the grammar, from token {at} on")]
    Resumed {
        /// Index of the first that does not.
        at: usize,
    },
}
