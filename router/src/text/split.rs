//! Llama 3's pre-tokeniser: a text as words, cut exactly where its regular expression cuts, without an engine for them.
//!
//! What is a letter, a number or white space is asked of the tokenizer library's own engine, once a process, so that the
//! two can't come to differ over a version of Unicode.

use std::sync::OnceLock;

use tokenizers::utils::SysRegex;

/// The expression that this is written for, as tokenizer.json has it.
pub(super) const PATTERN: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// What the expression tells apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    Letter,
    Number,
    /// CR and LF.
    Line,
    /// Other white space.
    Space,
    Other,
}

/// Characters that share a page of the table.
const PAGE: usize = 256;

/// The class of every character. Most pages are alike, and kept once.
#[derive(Debug)]
struct Classes {
    page: Vec<u16>,
    pages: Vec<[Class; PAGE]>,
}

impl Classes {
    fn get() -> &'static Self {
        static CLASSES: OnceLock<Classes> = OnceLock::new();
        CLASSES.get_or_init(Self::ask)
    }

    fn ask() -> Self {
        let all: String = ('\0'..=char::MAX).collect();
        let mut class = vec![Class::Other; char::MAX as usize + 1];
        for (expression, of) in [
            (r"\p{L}+", Class::Letter),
            (r"\p{N}+", Class::Number),
            (r"\s+", Class::Space),
            (r"[\r\n]+", Class::Line),
        ] {
            let expression = SysRegex::new(expression).expect("a part of the expression in use");
            for (start, end) in expression.find_iter(&all) {
                all[start..end].chars().for_each(|c| class[c as usize] = of);
            }
        }
        let mut pages: Vec<[Class; PAGE]> = Vec::new();
        let page = class
            .chunks(PAGE)
            .map(|chunk| {
                let this: [Class; PAGE] = chunk.try_into().expect("code points are whole pages");
                let known = pages.iter().position(|page| *page == this);
                let at = known.unwrap_or_else(|| {
                    pages.push(this);
                    pages.len() - 1
                });
                u16::try_from(at).expect("no more pages than 0x1100")
            })
            .collect();
        Self { page, pages }
    }

    fn of(&self, c: char) -> Class {
        let code = c as usize;
        self.pages[usize::from(self.page[code / PAGE])][code % PAGE]
    }
}

/// The words of a text, in order; together they are all of it.
pub(super) struct Words<'a> {
    classes: &'static Classes,
    rest: &'a str,
}

/// The words of `text`.
pub(super) fn words(text: &str) -> Words<'_> {
    Words {
        classes: Classes::get(),
        rest: text,
    }
}

impl<'a> Iterator for Words<'a> {
    type Item = &'a str;

    fn next(&mut self) -> Option<&'a str> {
        let first = self.rest.chars().next()?;
        let (word, rest) = self.rest.split_at(self.word(first));
        self.rest = rest;
        Some(word)
    }
}

impl Words<'_> {
    /// Where the word at the beginning of the rest ends. The order of the cases is the expression's.
    fn word(&self, first: char) -> usize {
        let text = self.rest;
        if let Some(end) = contraction(text) {
            return end;
        }
        let (class, after) = (self.classes.of(first), first.len_utf8());
        let next = text[after..].chars().next().map(|c| self.classes.of(c));
        match (class, next) {
            (Class::Letter, _) | (Class::Space | Class::Other, Some(Class::Letter)) => {
                self.run(after, Class::Letter)
            }
            (Class::Number, _) => self.numbers(),
            (Class::Other, _) => self.others(after),
            (Class::Space, Some(Class::Other)) if first == ' ' => self.others(after),
            (Class::Space | Class::Line, _) => self.spaces(),
        }
    }

    /// Where the run of a class that goes on at `from` ends.
    fn run(&self, from: usize, class: Class) -> usize {
        self.end(from, |c| self.classes.of(c) == class)
    }

    fn end(&self, from: usize, goes_on: impl Fn(char) -> bool) -> usize {
        let rest = &self.rest[from..];
        from + rest.find(|c| !goes_on(c)).unwrap_or(rest.len())
    }

    /// Up to three.
    fn numbers(&self) -> usize {
        let three = self.rest.chars().take(3);
        let numbers = three.take_while(|&c| self.classes.of(c) == Class::Number);
        numbers.map(char::len_utf8).sum()
    }

    /// What is neither letter, number nor white space, and the line ends after it.
    fn others(&self, from: usize) -> usize {
        self.run(self.run(from, Class::Other), Class::Line)
    }

    /// White space up to its last line end; else all of it at the text's end; else all but its last character, which
    /// belongs to what follows; else that one.
    fn spaces(&self) -> usize {
        let end = self.end(0, |c| matches!(self.classes.of(c), Class::Space | Class::Line));
        let run = &self.rest[..end];
        if let Some(last) = run.rfind(['\r', '\n']) {
            return last + 1;
        }
        let last = run.chars().next_back().map_or(0, char::len_utf8);
        if end == self.rest.len() || end == last {
            end
        } else {
            end - last
        }
    }
}

/// 's, 't, 're, 've, 'm, 'll or 'd in any case, to which the long s belongs.
fn contraction(text: &str) -> Option<usize> {
    let mut after = text.strip_prefix('\'')?.chars();
    let second = after.next()?;
    let mut third = || after.next().map(|c| c.to_ascii_lowercase());
    match second.to_ascii_lowercase() {
        's' | 't' | 'm' | 'd' | '\u{17f}' => Some(1 + second.len_utf8()),
        'r' | 'v' => (third()? == 'e').then_some(3),
        'l' => (third()? == 'l').then_some(3),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn assert_cuts(expression: &SysRegex, text: &str) {
        let expected = expression.find_iter(text).map(|(start, end)| &text[start..end]);
        let (expected, got): (Vec<&str>, Vec<&str>) = (expected.collect(), words(text).collect());
        assert_eq!(got, expected, "{text:?}");
    }

    #[test]
    fn every_short_text_is_cut_as_the_expression_cuts_it() {
        let expression = SysRegex::new(PATTERN).expect("an expression");
        let alphabet = [
            "a", "É", "日", "1", "Ⅳ", " ", "\t", "\u{3000}", "\n", "\r", "'", "s", "L", "!", "\u{301}", "😀",
        ];
        let n = alphabet.len();
        for number in 0..n.pow(4) {
            let text: String = (0..4).map(|place| alphabet[number / n.pow(place) % n]).collect();
            for end in text
                .char_indices()
                .map(|(end, _)| end)
                .skip(1)
                .chain([text.len()])
            {
                assert_cuts(&expression, &text[..end]);
            }
        }
    }

    #[test]
    fn every_character_is_cut_as_the_expression_cuts_it() {
        let expression = SysRegex::new(PATTERN).expect("an expression");
        let all: Vec<char> = ('\0'..=char::MAX).collect();
        for some in all.chunks(512) {
            let text: String = some
                .iter()
                .map(|c| format!("a{c}1{c} {c}{c}b\n{c}'{c}'r{c}'l{c}  {c}\t{c}"))
                .collect();
            assert_cuts(&expression, &text);
        }
    }
}
