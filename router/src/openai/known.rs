//! Every request field that OpenAI's interface and vLLM's additions to it have, and what becomes of it here.
//!
//! The table decides: what it calls served is read by the page's parser (a test compares), what it refuses is refused
//! with its reason, and what has no effect is let pass. API.md is written from it.

/// What a request is sent to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Page {
    Chat,
    Completions,
    Tokenize,
    Detokenize,
}

/// Who defined a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    OpenAi,
    Vllm,
}

/// What becomes of a field.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Fate {
    Served,
    /// With 400.
    Refused {
        /// Values that ask for nothing, beside null and false, as JSON.
        harmless: &'static [&'static str],
        /// Empty values ask for nothing either.
        empty_is_nothing: bool,
    },
    WithoutEffect,
}

/// A field.
#[derive(Clone, Copy, Debug)]
pub(super) struct Known {
    pub(super) name: &'static str,
    pub(super) pages: &'static [Page],
    #[cfg_attr(not(test), expect(dead_code, reason = "the document alone tells it"))]
    pub(super) origin: Origin,
    pub(super) fate: Fate,
    /// What it does, or why it does not.
    pub(super) note: &'static str,
}

/// The field of that name.
pub(super) fn known(page: Page, name: &str) -> Option<&'static Known> {
    KNOWN
        .iter()
        .find(|field| field.name == name && field.pages.contains(&page))
}

const fn field(
    pages: &'static [Page],
    origin: Origin,
    name: &'static str,
    fate: Fate,
    note: &'static str,
) -> Known {
    Known {
        name,
        pages,
        origin,
        fate,
        note,
    }
}

const fn openai(pages: &'static [Page], name: &'static str, note: &'static str) -> Known {
    field(pages, Origin::OpenAi, name, Fate::Served, note)
}

const fn vllm(pages: &'static [Page], name: &'static str, note: &'static str) -> Known {
    field(pages, Origin::Vllm, name, Fate::Served, note)
}

const fn without_effect(
    pages: &'static [Page],
    origin: Origin,
    name: &'static str,
    note: &'static str,
) -> Known {
    field(pages, origin, name, Fate::WithoutEffect, note)
}

const fn refused(
    pages: &'static [Page],
    origin: Origin,
    name: &'static str,
    harmless: &'static [&'static str],
    note: &'static str,
) -> Known {
    let fate = Fate::Refused {
        harmless,
        empty_is_nothing: true,
    };
    field(pages, origin, name, fate, note)
}

/// An empty object asks for it too, with what is usual of it.
const fn refused_if_empty(
    pages: &'static [Page],
    origin: Origin,
    name: &'static str,
    note: &'static str,
) -> Known {
    let fate = Fate::Refused {
        harmless: &[],
        empty_is_nothing: false,
    };
    field(pages, origin, name, fate, note)
}

use Origin::{OpenAi, Vllm};

const ALL: &[Page] = &[Page::Chat, Page::Completions, Page::Tokenize, Page::Detokenize];
const BOTH: &[Page] = &[Page::Chat, Page::Completions];
const CHAT: &[Page] = &[Page::Chat];
const TEXT: &[Page] = &[Page::Completions];
const CONVERSATIONS: &[Page] = &[Page::Chat, Page::Tokenize];
const TEXTS: &[Page] = &[Page::Completions, Page::Tokenize];
const TOKENS: &[Page] = &[Page::Tokenize];
const BACK: &[Page] = &[Page::Detokenize];

const TEXT_ONLY: &str = "only text goes in and out";
const BEAMS: &str = "beam search is not supported";

const KNOWN: &[Known] = &[
    openai(
        ALL,
        "model",
        "a served name; may be left out where one model is served",
    ),
    openai(
        CONVERSATIONS,
        "messages",
        "1 to 4096; contents are text; /tokenize takes them or `prompt`",
    ),
    openai(
        TEXTS,
        "prompt",
        "a text; for completions also texts, token ids, or lists of token ids",
    ),
    openai(BOTH, "stream", "server-sent events"),
    openai(
        BOTH,
        "stream_options",
        "`include_usage`, and vLLM's `continuous_usage_stats`; `include_obfuscation` has no effect",
    ),
    openai(BOTH, "n", "1 to 128; prompts times n at most 4096"),
    openai(
        BOTH,
        "max_tokens",
        "completions: 16 if absent; conversations: up to the context's end",
    ),
    openai(BOTH, "max_completion_tokens", "counts where both are given"),
    openai(
        BOTH,
        "temperature",
        "0 to 2; 0 is greedy; absent: the model's default",
    ),
    openai(BOTH, "top_p", "above 0, to 1"),
    openai(BOTH, "presence_penalty", "-2 to 2"),
    openai(BOTH, "frequency_penalty", "-2 to 2"),
    openai(
        BOTH,
        "seed",
        "64 bits, signed or not; the same seed draws the same tokens",
    ),
    openai(BOTH, "logit_bias", "token ids to -100..100, at most 1024"),
    openai(
        BOTH,
        "stop",
        "a text or texts, at most 256; a special token's text stops by its id",
    ),
    openai(
        BOTH,
        "logprobs",
        "completions: 0 to 20; conversations: true or false",
    ),
    openai(CHAT, "top_logprobs", "0 to 20, with `logprobs`"),
    openai(
        TEXT,
        "echo",
        "the prompt before the output, with its scores if `logprobs` asks for them",
    ),
    openai(
        TEXT,
        "best_of",
        "the value of `n`, which is what is done anyway; others are refused",
    ),
    vllm(BOTH, "top_k", "0 or -1 keep all"),
    vllm(BOTH, "min_p", "0 to 1"),
    openai(
        BOTH,
        "response_format",
        "`text`, `json_object`, `json_schema`, which is followed, `strict` or not; and `{\"type\": \"regex\", \"regex\": ...}`, `{\"type\": \"grammar\", \"grammar\": ...}` in Lark's notation",
    ),
    vllm(
        BOTH,
        "structured_outputs",
        "one of `json`, `regex`, `choice`, `grammar`, `json_object`; between tokens of JSON at most 32 characters of space",
    ),
    vllm(BOTH, "guided_json", "older form of `structured_outputs.json`"),
    vllm(BOTH, "guided_regex", "older form of `structured_outputs.regex`"),
    vllm(BOTH, "guided_choice", "older form of `structured_outputs.choice`"),
    vllm(
        BOTH,
        "guided_grammar",
        "older form of `structured_outputs.grammar`",
    ),
    vllm(BOTH, "repetition_penalty", "above 0, to 10"),
    vllm(BOTH, "min_tokens", "no stop before so many tokens"),
    vllm(BOTH, "stop_token_ids", "at most 1024"),
    vllm(BOTH, "ignore_eos", "run past the model's own ends"),
    vllm(
        BOTH,
        "include_stop_str_in_output",
        "leave what matched in the text",
    ),
    vllm(BOTH, "skip_special_tokens", "absent: true"),
    vllm(BACK, "skip_special_tokens", "absent: false"),
    vllm(BOTH, "prompt_logprobs", "0 to 20; in a stream on its first chunk"),
    vllm(
        BOTH,
        "return_token_ids",
        "`token_ids` and `prompt_token_ids`; in a stream the latter on its first chunk",
    ),
    vllm(
        BOTH,
        "return_tokens_as_token_ids",
        "log-probabilities name tokens `token_id:N`",
    ),
    vllm(
        BOTH,
        "cache_salt",
        "cached prefixes are shared only under equal salts",
    ),
    vllm(
        &[Page::Chat, Page::Completions, Page::Tokenize],
        "add_special_tokens",
        "absent: true for texts, false for conversations, whose template writes them",
    ),
    openai(
        CONVERSATIONS,
        "tools",
        "functions, at most 128, where the model's chat template reads `tools`; calls are read as Llama 3 writes them; `strict` or not, calls follow the parameters' schemas where `tool_choice` asks for one",
    ),
    openai(
        CHAT,
        "tool_choice",
        "`none` hides the tools; `required` or a name binds the answer by a grammar",
    ),
    openai(
        CHAT,
        "parallel_tool_calls",
        "false: calls after the first are dropped",
    ),
    vllm(
        CONVERSATIONS,
        "documents",
        "where the model's chat template reads `documents`",
    ),
    vllm(CONVERSATIONS, "add_generation_prompt", "absent: true"),
    vllm(
        CONVERSATIONS,
        "continue_final_message",
        "the model goes on with the last message",
    ),
    vllm(
        CONVERSATIONS,
        "chat_template_kwargs",
        "further variables of the template",
    ),
    vllm(
        TOKENS,
        "return_token_strs",
        "the tokens as the vocabulary writes them, too",
    ),
    vllm(BACK, "tokens", "token ids"),
    refused(CHAT, OpenAi, "functions", &[], "superseded by `tools`"),
    refused(
        CHAT,
        OpenAi,
        "function_call",
        &["\"none\""],
        "superseded by `tool_choice`",
    ),
    refused(
        BOTH,
        Vllm,
        "guided_whitespace_pattern",
        &[],
        "white space is as JSON has it",
    ),
    refused(
        BOTH,
        Vllm,
        "allowed_token_ids",
        &[],
        "use `response_format`, or `logit_bias`",
    ),
    refused(BOTH, Vllm, "bad_words", &[], "use `logit_bias`"),
    refused(
        BOTH,
        Vllm,
        "logits_processors",
        &[],
        "no code of clients runs here",
    ),
    refused(CHAT, OpenAi, "audio", &[], TEXT_ONLY),
    refused(CHAT, OpenAi, "modalities", &["[\"text\"]"], TEXT_ONLY),
    refused(CHAT, OpenAi, "moderation", &[], "there is no moderation"),
    refused_if_empty(CHAT, OpenAi, "web_search_options", "there is no web search"),
    refused(BOTH, Vllm, "mm_processor_kwargs", &[], TEXT_ONLY),
    refused(TEXT, Vllm, "prompt_embeds", &[], "prompts are text or token ids"),
    refused(
        TEXT,
        OpenAi,
        "suffix",
        &[],
        "there is no infilling: the model continues a prompt",
    ),
    refused(BOTH, Vllm, "use_beam_search", &[], BEAMS),
    refused(BOTH, Vllm, "early_stopping", &[], BEAMS),
    refused(BOTH, Vllm, "length_penalty", &["1", "1.0"], BEAMS),
    refused(
        CHAT,
        Vllm,
        "best_of",
        &["1"],
        "choosing among more answers than are returned is not supported; use n",
    ),
    refused(
        CHAT,
        Vllm,
        "echo",
        &[],
        "a conversation is not echoed; use plain completions",
    ),
    refused(
        CONVERSATIONS,
        Vllm,
        "chat_template",
        &[],
        "the model's own chat template is used",
    ),
    refused(
        BOTH,
        Vllm,
        "truncate_prompt_tokens",
        &[],
        "a prompt is never cut; shorten it",
    ),
    refused(BOTH, Vllm, "priority", &["0"], "requests have no priorities"),
    refused(
        BOTH,
        Vllm,
        "kv_transfer_params",
        &[],
        "caches are not moved between replicas",
    ),
    refused(
        BOTH,
        Vllm,
        "vllm_xargs",
        &[],
        "there are no custom sampling arguments",
    ),
    without_effect(BOTH, OpenAi, "user", "nothing is kept by user"),
    without_effect(BOTH, OpenAi, "store", "nothing is stored"),
    without_effect(BOTH, OpenAi, "metadata", "nothing is stored"),
    without_effect(BOTH, OpenAi, "service_tier", "there is one"),
    without_effect(
        CHAT,
        OpenAi,
        "reasoning_effort",
        "the model decides; templates read chat_template_kwargs",
    ),
    without_effect(CHAT, OpenAi, "verbosity", "the model decides"),
    without_effect(CHAT, OpenAi, "prediction", "it could only make an answer faster"),
    without_effect(
        BOTH,
        OpenAi,
        "prompt_cache_key",
        "prefixes are found by their content",
    ),
    without_effect(
        BOTH,
        OpenAi,
        "prompt_cache_options",
        "prefixes are found by their content",
    ),
    without_effect(
        BOTH,
        OpenAi,
        "prompt_cache_retention",
        "prefixes are kept while there is room",
    ),
    without_effect(BOTH, OpenAi, "safety_identifier", "nothing is kept by user"),
    without_effect(
        CHAT,
        Vllm,
        "include_reasoning",
        "reasoning is not told apart from answers",
    ),
    without_effect(BOTH, Vllm, "spaces_between_special_tokens", "none are added"),
    without_effect(BOTH, Vllm, "guided_decoding_backend", "there is one"),
    without_effect(
        BOTH,
        Vllm,
        "request_id",
        "the header `x-request-id` names a request",
    ),
];

#[cfg(test)]
pub(super) use tests::assert_reads;

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const PAGES: [(Page, &str); 4] = [
        (Page::Chat, "/v1/chat/completions"),
        (Page::Completions, "/v1/completions"),
        (Page::Tokenize, "/tokenize"),
        (Page::Detokenize, "/detokenize"),
    ];

    const HEAD: &str = "# Request fields

Written from the router's own table by its tests; `SWALLOW_UPDATE_GOLDENS=1 cargo test -p swallow-router --lib` writes it
anew. What is refused is refused with 400 and the reason, unless its value asks for nothing (null, false, empty, or as
listed). A field that is not listed is ignored, named in the response header `x-swallow-ignored-fields`, and counted in
`swallow_router_ignored_fields_total`.

## Headers

| header | of | |
|---|---|---|
| `x-request-timeout-ms` | requests | how long the client waits, in milliseconds: it binds the whole request, in the queue and at the worker, streams too; then 504, or where a stream has begun an error as its last event |
| `grpc-timeout` | requests | the same in gRPC's form, as `300m`, for gateways that translate; the sooner of both counts |
| `x-request-id` | both | names a request: the client's own, or one made here |
| `x-swallow-ignored-fields` | responses | fields that nobody knows |
| `retry-after` | responses | with 429 and 503: when to come again |

A stream whose first token takes longer than 15 s begins without it: status 200, and a comment, `: waiting`, each 15 s, so
that proxies keep the connection. An error is then the stream's last event.

`GET /tokenizer_info` gives, where the router runs with `--tokenizer-info`, what tokenizer_config.json says and the chat
template in use, in vLLM's shape; `?model=` picks one of several models.
";

    fn table() -> String {
        let mut text = HEAD.to_owned();
        for (page, path) in PAGES {
            text += &format!("\n## {path}\n\n| field | defined by | here | |\n|---|---|---|---|\n");
            for Known {
                name,
                origin,
                fate,
                note,
                ..
            } in KNOWN.iter().filter(|field| field.pages.contains(&page))
            {
                let origin = match origin {
                    Origin::OpenAi => "OpenAI",
                    Origin::Vllm => "vLLM",
                };
                let fate = match fate {
                    Fate::Served => "served".to_owned(),
                    Fate::WithoutEffect => "no effect".to_owned(),
                    Fate::Refused {
                        empty_is_nothing: false,
                        ..
                    } => "refused, if empty too".to_owned(),
                    Fate::Refused { harmless: [], .. } => "refused".to_owned(),
                    Fate::Refused { harmless, .. } => format!("refused, but for `{}`", harmless[0]),
                };
                text += &format!("| `{name}` | {origin} | {fate} | {note} |\n");
            }
        }
        text
    }

    #[test]
    fn the_document_says_what_the_table_says() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/API.md");
        if std::env::var_os("SWALLOW_UPDATE_GOLDENS").is_some() {
            std::fs::write(path, table()).expect("the folder can be written");
        }
        let written = std::fs::read_to_string(path).expect("API.md is there");
        assert_eq!(
            written,
            table(),
            "with SWALLOW_UPDATE_GOLDENS=1 it is written anew"
        );
    }

    #[test]
    fn a_field_has_one_fate_on_a_page() {
        for (page, path) in PAGES {
            let names: Vec<&str> = KNOWN
                .iter()
                .filter(|field| field.pages.contains(&page))
                .map(|field| field.name)
                .collect();
            assert_eq!(names.iter().collect::<BTreeSet<_>>().len(), names.len(), "{path}");
        }
        for known in KNOWN {
            if let Fate::Refused { harmless, .. } = known.fate {
                for text in harmless {
                    serde_json::from_str::<serde_json::Value>(text).expect(known.name);
                }
            }
        }
    }

    /// What a page's parser asks for is what the table calls served there.
    pub(in crate::openai) fn assert_reads(page: Page, read: &[String]) {
        let read: BTreeSet<&str> = read.iter().map(String::as_str).collect();
        let served: BTreeSet<&str> = KNOWN
            .iter()
            .filter(|field| field.pages.contains(&page) && field.fate == Fate::Served)
            .map(|field| field.name)
            .collect();
        assert_eq!(read, served, "{page:?}");
    }
}
