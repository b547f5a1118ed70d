//! Text becomes numbers once, numbers become text once.
//!
//! `Tokenizer` is built from a model's own files and knows the exact bytes of every token. `Transcript` turns one
//! candidate's tokens into text as they arrive: whole code points only, nothing past a stop string, and not one
//! character later than these two rules ask for.

mod bpe;
mod decoder;
mod split;
mod stops;
mod tokenizer;
mod transcript;
mod utf8;

pub use decoder::UnsupportedDecoder;
pub use stops::{StopCursor, StopSet};
pub use tokenizer::{Tokenizer, TokenizerError};
pub use transcript::{Shown, Transcript, Wording};
pub use utf8::Utf8Assembler;
