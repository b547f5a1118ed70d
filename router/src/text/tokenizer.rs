//! A model's tokenizer: text to ids through `Bpe` where the model's file allows that, and else through the `tokenizers`
//! library; ids to bytes through a table of our own.
//!
//! The table is exact for every id: a token cut inside a character keeps its bytes, an id that the vocabulary does
//! not know has none. A text never begins with two beginning-of-sequence tokens unless its author wrote both.

use std::{collections::HashMap, fmt};

use serde::Deserialize;
use serde_json::Value;

use super::{
    bpe::Bpe,
    decoder::{Decoder, UnsupportedDecoder},
};

/// A tokenizer that can't be used, or a text it can't read.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// tokenizer.json is not one.
    #[error("tokenizer.json can't be read: {0}")]
    Malformed(String),
    /// Its decoder gives tokens no bytes of their own.
    #[error(transparent)]
    Decoder(#[from] UnsupportedDecoder),
    /// An id far outside of what a vocabulary may hold.
    #[error(
        "tokenizer.json gives token '{token}' the id {id}; ids must be below {}",
        MAX_IDS
    )]
    Id {
        /// The token.
        token: String,
        /// Its id.
        id: u32,
    },
    /// The text has no tokens in this vocabulary.
    #[error("the text can't be tokenised: {0}")]
    Encode(String),
}

const MAX_IDS: u32 = 1 << 24; // A hundred times the largest vocabulary in use; bounds the table.

/// With a normalizer, a token may stand for more bytes than it shows: composition shrinks a character at most so far.
const NORMALIZER_SHRINK: usize = 4;

/// The parts of tokenizer.json that the library does not give out.
#[derive(Deserialize)]
struct Sections {
    #[serde(default)]
    decoder: Value,
    #[serde(default)]
    normalizer: Value,
}

/// One model's vocabulary, both ways. Immutable; shared by all requests.
pub struct Tokenizer {
    library: tokenizers::Tokenizer,
    /// The same ids, sooner.
    bpe: Option<Bpe>,
    /// The bytes of all tokens one after another; token i ends at `ends[i]`.
    bytes: Vec<u8>,
    ends: Vec<u32>,
    special: Vec<bool>,
    added: HashMap<String, u32>,
    strip_start: usize,
    bytes_per_token: usize,
    bos: Option<Bos>,
}

/// The beginning-of-sequence token and who writes it.
struct Bos {
    id: u32,
    text: String,
    /// The library's post-processor puts it before a text.
    by_processor: bool,
    /// A text should have it.
    wanted: bool,
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer")
            .field("ids", &self.ends.len())
            .finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// From the bytes of tokenizer.json. `bos` is the text of the beginning-of-sequence token, `add_bos` what
    /// tokenizer_config.json's `add_bos_token` says; where it says nothing, tokenizer.json's post-processor decides.
    pub fn load(json: &[u8], bos: Option<&str>, add_bos: Option<bool>) -> Result<Self, TokenizerError> {
        let malformed = |error: String| TokenizerError::Malformed(error);
        let sections: Sections = serde_json::from_slice(json).map_err(|e| malformed(e.to_string()))?;
        let decoder = Decoder::parse(&sections.decoder)?;
        let mut library = tokenizers::Tokenizer::from_bytes(json).map_err(|e| malformed(e.to_string()))?;
        library
            .with_truncation(None)
            .map_err(|e| malformed(e.to_string()))?;
        library.with_padding(None);
        let shrink = if sections.normalizer.is_null() {
            1
        } else {
            NORMALIZER_SHRINK
        };
        let bpe = Bpe::read(json, &library);
        let mut this = Self::with_table(library, &decoder, shrink)?;
        this.bpe = bpe;
        this.bos = bos.and_then(|text| this.find_bos(text, add_bos));
        Ok(this)
    }

    fn with_table(
        library: tokenizers::Tokenizer,
        decoder: &Decoder,
        shrink: usize,
    ) -> Result<Self, TokenizerError> {
        let added = library.get_added_tokens_decoder();
        let mut tokens: Vec<(u32, String)> = library
            .get_vocab(false)
            .into_iter()
            .map(|(token, id)| (id, token))
            .collect();
        tokens.extend(added.iter().map(|(&id, token)| (id, token.content.clone())));
        // Stable: where an id is in both, the added token comes last and counts.
        tokens.sort_by_key(|&(id, _)| id);
        if let Some((id, token)) = tokens.last().filter(|(id, _)| *id >= MAX_IDS) {
            return Err(TokenizerError::Id {
                token: token.clone(),
                id: *id,
            });
        }
        let n_ids = tokens.last().map_or(0, |&(id, _)| id as usize + 1);
        let mut table: Vec<Vec<u8>> = vec![Vec::new(); n_ids];
        let mut special = vec![false; n_ids];
        for (id, token) in tokens {
            let as_added = added.get(&id).filter(|added| added.content == token);
            special[id as usize] = as_added.is_some_and(|added| added.special);
            // An added token is its own text; only the model's vocabulary is written in the decoder's way.
            table[id as usize] = if as_added.is_some() {
                token.into_bytes()
            } else {
                decoder.bytes(&token)
            };
        }
        let longest = table.iter().map(Vec::len).max().unwrap_or(1).max(1);
        let mut end = 0;
        let ends = table
            .iter()
            .map(|token| {
                end += token.len() as u32;
                end
            })
            .collect();
        Ok(Self {
            bytes: table.concat(),
            ends,
            special,
            added: added
                .iter()
                .map(|(&id, token)| (token.content.clone(), id))
                .collect(),
            strip_start: decoder.strip_start(),
            bytes_per_token: longest * shrink,
            bos: None,
            bpe: None,
            library,
        })
    }

    fn find_bos(&self, text: &str, add_bos: Option<bool>) -> Option<Bos> {
        let id = self.library.token_to_id(text)?;
        let encoded = self.library.encode_fast("a", true).ok();
        let by_processor = encoded.is_some_and(|encoding| encoding.get_ids().first() == Some(&id));
        Some(Bos {
            id,
            text: text.to_owned(),
            by_processor,
            wanted: add_bos.unwrap_or(by_processor),
        })
    }

    /// The ids of `text`. With `add_special`, what the model expects around a text is added: one
    /// beginning-of-sequence token where it has one, and none where the text itself begins with it.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TokenizerError> {
        let mut ids = match &self.bpe {
            Some(bpe) => bpe.encode(text, add_special),
            None => {
                let encoding = self.library.encode_fast(text, add_special);
                let encoding = encoding.map_err(|e| TokenizerError::Encode(e.to_string()))?;
                encoding.get_ids().to_vec()
            }
        };
        if let (true, Some(bos)) = (add_special, &self.bos) {
            let written = text.starts_with(&bos.text);
            match (bos.by_processor, bos.wanted && !written) {
                (true, false) if ids.first() == Some(&bos.id) => drop(ids.remove(0)),
                (false, true) => ids.insert(0, bos.id),
                _ => {}
            }
        }
        Ok(ids)
    }

    /// Whether texts are encoded here, in time linear in their length, and not by the library.
    pub fn is_own(&self) -> bool {
        self.bpe.is_some()
    }

    /// A text of so many bytes has at least so many tokens: known without reading it.
    pub fn least_tokens(&self, text_bytes: usize) -> usize {
        text_bytes / self.bytes_per_token
    }

    /// What `id` stands for; nothing for an id outside of the vocabulary.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        let Some(&end) = self.ends.get(id as usize) else {
            return &[];
        };
        let start = if id == 0 { 0 } else { self.ends[id as usize - 1] };
        &self.bytes[start as usize..end as usize]
    }

    /// What the vocabulary calls `id`, as a byte-level one writes a space `Ġ`; nothing outside of it.
    pub fn name(&self, id: u32) -> Option<String> {
        self.library.id_to_token(id)
    }

    /// A control token, which is not part of the text.
    pub fn is_special(&self, id: u32) -> bool {
        self.special.get(id as usize).copied().unwrap_or(false)
    }

    /// The added token (special or not) that is exactly `text`.
    pub fn added_token(&self, text: &str) -> Option<u32> {
        self.added.get(text).copied()
    }

    /// The beginning-of-sequence token.
    pub fn bos(&self) -> Option<u32> {
        self.bos.as_ref().map(|bos| bos.id)
    }

    /// Ids are below this.
    pub fn n_ids(&self) -> usize {
        self.ends.len()
    }

    /// The exact bytes of a whole text, from its beginning.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Vec<u8> {
        let mut bytes: Vec<u8> = Vec::with_capacity(ids.len() * 4);
        let mut strip = self.strip_start;
        for &id in ids {
            if self.is_special(id) {
                if !skip_special {
                    bytes.extend_from_slice(self.token_bytes(id));
                }
                continue;
            }
            let token = self.token_bytes(id);
            let spaces = token.iter().take(strip).take_while(|&&byte| byte == b' ').count();
            bytes.extend_from_slice(&token[spaces..]);
            strip = if spaces < token.len() { 0 } else { strip - spaces };
        }
        bytes
    }
}
