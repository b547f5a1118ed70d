//! The vocabulary as the grammars see it: the bytes of each token, in a tree.

use std::{panic::AssertUnwindSafe, sync::Arc};

use llguidance::{
    ParserFactory,
    api::ParserLimits,
    earley::SlicedBiasComputer,
    panic_utils, token_bytes_from_tokenizer_json,
    toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie},
};

use super::{GrammarError, compile::one_line};

/// What one grammar may cost. The library's own bounds are for programs that compile their own grammars. A schema of 300
/// properties is within these, and the dearest that was found takes a second to compile.
fn limits() -> ParserLimits {
    ParserLimits {
        initial_lexer_fuel: 50_000,
        max_grammar_size: 15_000,
        // Of a mask, which a step waits for: some milliseconds.
        step_lexer_fuel: 100_000,
        step_max_items: 20_000,
        max_items_in_row: 2_000,
        // Of 1 to 2 kB, for each sequence.
        max_lexer_states: 10_000,
        precompute_large_lexemes: true,
        // They would hold the whole grammar and output.
        verbose_errors: false,
    }
}

/// From tokenizer.json. `n_vocab` logits come from the model; the tokenizer may know fewer tokens, or more.
pub(super) fn factory(
    tokenizer: &[u8],
    n_vocab: u32,
    eos_token_ids: &[u32],
) -> Result<ParserFactory, GrammarError> {
    let Some(&first_eos) = eos_token_ids.first() else {
        let why = "it names no end-of-text token, with which an output that is complete would end";
        return Err(GrammarError::Model(why.into()));
    };
    // An odd file makes the library panic here and there.
    panic_utils::catch_unwind(AssertUnwindSafe(|| {
        Ok(read(tokenizer, n_vocab, first_eos, eos_token_ids))
    }))
    .unwrap_or_else(|error| {
        Err(failed(
            "tokenizer.json can't be read",
            one_line(&error.to_string()),
        ))
    })
}

fn failed(what: &str, error: String) -> GrammarError {
    GrammarError::Model(format!("{what}: {error}"))
}

fn read(
    tokenizer: &[u8],
    n_vocab: u32,
    first_eos: u32,
    eos_token_ids: &[u32],
) -> Result<ParserFactory, GrammarError> {
    let json = serde_json::from_slice(tokenizer)
        .map_err(|error| failed("tokenizer.json is not JSON", error.to_string()))?;
    let mut words = token_bytes_from_tokenizer_json(&json)
        .map_err(|error| failed("tokenizer.json has no bytes of tokens", error.to_string()))?;
    // Tokens without bytes are never allowed.
    words.resize(n_vocab as usize, Vec::new());
    let trie = TokTrie::from(&TokRxInfo::new(n_vocab, first_eos), &words).with_eos_tokens(eos_token_ids);
    let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
    let slices = SlicedBiasComputer::general_slices();
    let mut factory = ParserFactory::new(&env, InferenceCapabilities::default(), &slices)
        .map_err(|error| failed("its vocabulary can't be indexed", error.to_string()))?;
    factory.quiet();
    *factory.limits_mut() = limits();
    Ok(factory)
}
