//! A model's own chat template, rendered as the reference implementation in Python renders it.
//!
//! The tokens that a model sees depend on every space and quote here, so what differs between Jinja2 in Python and
//! minijinja is put back: `tojson` is `json.dumps`, printed values look like Python's, strings have Python's methods.
//! Rendering is bounded in work; the time of day is an argument.

mod context;
mod json;
mod python;

use std::{collections::HashSet, error::Error as _, fmt};

use jiff::Zoned;
use minijinja::{Environment, ErrorKind, UndefinedBehavior, syntax::SyntaxConfig};
use minijinja_contrib::pycompat::unknown_method_callback;

pub use context::{Conversation, SpecialTokens};

/// A template that can't be compiled, or a conversation that it doesn't take.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// The template is at fault.
    #[error("the model's chat template can't be compiled: {0}")]
    Compile(String),
    /// The template itself refused the conversation, with `raise_exception`.
    #[error("the model's chat template refuses the conversation: {0}")]
    Raised(String),
    /// The conversation lacks what the template reads, or the template is at fault.
    #[error("the model's chat template can't be applied to the conversation: {0}")]
    Render(String),
    /// Rendering took more work than is allowed.
    #[error("the conversation is too long for the model's chat template: rendering took more than {0} steps")]
    Work(u64),
}

/// Steps of the template engine that one conversation may take: about a second, a thousand times a usual one.
const FUEL: u64 = 5_000_000;

const NAME: &str = "chat_template";

/// A compiled chat template.
pub struct ChatTemplate {
    env: Environment<'static>,
    /// Variables that it names and does not set itself.
    reads: HashSet<String>,
    shows_calls: bool,
}

impl fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ChatTemplate")
    }
}

impl ChatTemplate {
    /// Compiles the text of a template.
    pub fn compile(source: &str) -> Result<Self, TemplateError> {
        let compile = |error: minijinja::Error| TemplateError::Compile(told(&error));
        let mut env = Environment::new();
        let mut syntax = SyntaxConfig::builder();
        syntax.trim_blocks(true).lstrip_blocks(true);
        env.set_syntax(syntax.build().map_err(compile)?);
        env.set_undefined_behavior(UndefinedBehavior::Lenient);
        env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        env.set_fuel(Some(FUEL));
        env.set_formatter(python::print);
        env.set_unknown_method_callback(unknown_method_callback);
        env.add_filter("tojson", json::tojson);
        env.add_filter("string", python::string);
        env.add_function("raise_exception", raise_exception);
        env.add_template_owned(NAME, without_generation_marks(source))
            .map_err(compile)?;
        let reads = env
            .get_template(NAME)
            .map_err(compile)?
            .undeclared_variables(false);
        let shows_calls = source.contains("tool_calls");
        Ok(Self {
            env,
            reads,
            shows_calls,
        })
    }

    /// Whether it makes use of the calls that a message may have.
    pub fn shows_calls(&self) -> bool {
        self.shows_calls
    }

    /// Whether it makes use of a variable.
    pub fn reads(&self, variable: &str) -> bool {
        self.reads.contains(variable)
    }

    /// The conversation as the text that the model continues.
    pub fn render(
        &self,
        conversation: &Conversation<'_>,
        tokens: &SpecialTokens,
        now: &Zoned,
    ) -> Result<String, TemplateError> {
        let template = self
            .env
            .get_template(NAME)
            .map_err(|error| TemplateError::Compile(told(&error)))?;
        template
            .render(context::context(conversation, tokens, now))
            .map_err(|error| {
                if let Some(raised) = raised(&error) {
                    TemplateError::Raised(raised.0.clone())
                } else if out_of_fuel(&error) {
                    TemplateError::Work(FUEL)
                } else {
                    TemplateError::Render(told(&error))
                }
            })
    }
}

/// Where a conversation ends whose last message is to be continued: after its content, and before what the template
/// puts behind a message. Templates trim contents; space at the end stays if the template kept it. `None` if nothing
/// of it is shown.
pub fn end_of_last(rendered: &str, content: &str) -> Option<usize> {
    let trimmed = content.trim();
    if trimmed.is_empty() {
        return None;
    }
    let end = rendered.rfind(trimmed)? + trimmed.len();
    let space = &content[content.trim_end().len()..];
    Some(if rendered[end..].starts_with(space) {
        end + space.len()
    } else {
        end
    })
}

/// What a template said with `raise_exception`.
#[derive(Debug)]
struct Raised(String);

impl fmt::Display for Raised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

fn raise_exception(message: String) -> Result<(), minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Raised(message)))
}

fn raised(error: &minijinja::Error) -> Option<&Raised> {
    let mut source = error.source();
    while let Some(inner) = source {
        if let Some(raised) = inner.downcast_ref() {
            return Some(raised);
        }
        source = inner.source();
    }
    None
}

fn out_of_fuel(error: &minijinja::Error) -> bool {
    let inner = error
        .source()
        .and_then(|source| source.downcast_ref::<minijinja::Error>());
    error.kind() == ErrorKind::OutOfFuel || inner.is_some_and(out_of_fuel)
}

/// One line, with the place in the template.
fn told(error: &minijinja::Error) -> String {
    let what = error.detail().map_or_else(
        || error.kind().to_string(),
        |detail| format!("{}: {detail}", error.kind()),
    );
    match error.line() {
        Some(line) => format!("{what} (line {line} of the template)"),
        None => what,
    }
}

/// `{% generation %}` marks the assistant's tokens for training; here it is a block that is always shown.
fn without_generation_marks(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start + 2);
        out.push_str(before);
        let inner = tag.trim_start_matches(['-', '+']).trim_start();
        out.push_str(&tag[..tag.len() - inner.len()]);
        let word_end = inner
            .find(|c: char| !c.is_ascii_alphabetic())
            .unwrap_or(inner.len());
        let (word, after) = inner.split_at(word_end);
        out.push_str(match word {
            "generation" => "if true",
            "endgeneration" => "endif",
            other => other,
        });
        rest = after;
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_last_message_ends_before_what_the_template_puts_behind_it() {
        let rendered = "<u>say: one two<e><a>one two<e>";
        let end = end_of_last(rendered, "one two").expect("shown");
        assert_eq!(&rendered[..end], "<u>say: one two<e><a>one two");
        assert_eq!(
            end_of_last(rendered, "  one two \n"),
            Some(end),
            "trimmed by the template"
        );
        assert_eq!(
            end_of_last("<a>one \n<e>", "one \n"),
            Some(8),
            "kept by the template"
        );
        assert_eq!(end_of_last(rendered, "three"), None);
        assert_eq!(end_of_last(rendered, " \n"), None);
    }

    #[test]
    fn training_marks_show_their_content() {
        let source = "a {%- generation -%} b {%- endgeneration %}{% generation %}c{% endgeneration %}";
        let marked = without_generation_marks(source);
        assert_eq!(
            marked,
            "a {%- if true -%} b {%- endif %}{% if true %}c{% endif %}"
        );
        assert_eq!(
            without_generation_marks("{% set generations = 1 %}"),
            "{% set generations = 1 %}"
        );
    }
}
