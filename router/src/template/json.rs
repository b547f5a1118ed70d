//! `tojson` as `json.dumps(x, ensure_ascii=False)` writes it: spaces after separators, keys in their order, nothing
//! escaped for HTML. Models were trained on these very characters.

use std::fmt::Write as _;

use minijinja::{
    Error, ErrorKind, State, Value,
    value::{Kwargs, ValueKind},
};

use super::python::float;

/// How values are laid out.
struct Style {
    indent: Option<String>,
    item_separator: String,
    key_separator: String,
    ensure_ascii: bool,
    sort_keys: bool,
}

/// The filter: `x | tojson(ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
pub(super) fn tojson(state: &State<'_, '_>, value: &Value, args: Kwargs) -> Result<Value, Error> {
    let style = style(&args)?;
    args.assert_all_used()?;
    let mut out = String::new();
    write(&mut out, value, &style, 0)?;
    state.consume_fuel(out.len() as u64 / 64)?;
    Ok(Value::from(out))
}

fn style(args: &Kwargs) -> Result<Style, Error> {
    let indent = match args.get::<Option<Value>>("indent")? {
        None => None,
        Some(indent) if indent.is_none() => None,
        Some(indent) => Some(match indent.as_str() {
            Some(text) => text.to_owned(),
            None => " ".repeat(
                indent
                    .as_usize()
                    .filter(|n| *n <= 64)
                    .ok_or_else(|| bad("indent"))?,
            ),
        }),
    };
    let comma = if indent.is_some() { "," } else { ", " };
    let separators = match args.get::<Option<Value>>("separators")? {
        Some(pair) if !pair.is_none() => {
            let texts: Option<Vec<String>> = pair
                .try_iter()?
                .map(|text| text.as_str().map(str::to_owned))
                .collect();
            <[String; 2]>::try_from(texts.unwrap_or_default()).map_err(|_| bad("separators"))?
        }
        _ => [comma.to_owned(), ": ".to_owned()],
    };
    let [item_separator, key_separator] = separators;
    Ok(Style {
        indent,
        item_separator,
        key_separator,
        ensure_ascii: args.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sort_keys: args.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
    })
}

fn bad(argument: &str) -> Error {
    Error::new(
        ErrorKind::InvalidOperation,
        format!("tojson: {argument} is not of the expected form"),
    )
}

const MAX_DEPTH: usize = 100;

fn write(out: &mut String, value: &Value, style: &Style, depth: usize) -> Result<(), Error> {
    if depth > MAX_DEPTH {
        return Err(Error::new(
            ErrorKind::InvalidOperation,
            "tojson: the value is nested too deeply",
        ));
    }
    match value.kind() {
        ValueKind::None => out.push_str("null"),
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number if value.is_integer() => out.push_str(&value.to_string()),
        ValueKind::Number => out.push_str(&json_float(f64::try_from(value.clone())?)),
        ValueKind::String => quote(out, value.as_str().unwrap_or_default(), style.ensure_ascii),
        ValueKind::Seq | ValueKind::Iterable => {
            let items: Vec<Value> = value.try_iter()?.collect();
            list(out, ['[', ']'], &items, style, depth, |out, item| {
                write(out, item, style, depth + 1)
            })?;
        }
        ValueKind::Map => {
            let mut keys: Vec<Value> = value.try_iter()?.collect();
            if style.sort_keys {
                keys.sort();
            }
            list(out, ['{', '}'], &keys, style, depth, |out, key| {
                quote(out, &key_text(key)?, style.ensure_ascii);
                out.push_str(&style.key_separator);
                write(out, &value.get_item(key)?, style, depth + 1)
            })?;
        }
        kind => {
            let what = format!("tojson: a value of type {kind} is not JSON serializable");
            return Err(Error::new(ErrorKind::InvalidOperation, what));
        }
    }
    Ok(())
}

fn list(
    out: &mut String,
    [open, close]: [char; 2],
    items: &[Value],
    style: &Style,
    depth: usize,
    mut item: impl FnMut(&mut String, &Value) -> Result<(), Error>,
) -> Result<(), Error> {
    let line = |out: &mut String, depth: usize| {
        if let Some(indent) = &style.indent {
            out.push('\n');
            out.push_str(&indent.repeat(depth));
        }
    };
    out.push(open);
    for (i, value) in items.iter().enumerate() {
        if i > 0 {
            out.push_str(&style.item_separator);
        }
        line(out, depth + 1);
        item(out, value)?;
    }
    if !items.is_empty() {
        line(out, depth);
    }
    out.push(close);
    Ok(())
}

/// Python turns the keys that JSON can't have into text.
fn key_text(key: &Value) -> Result<String, Error> {
    match key.kind() {
        ValueKind::String => Ok(key.as_str().unwrap_or_default().to_owned()),
        ValueKind::None => Ok("null".to_owned()),
        ValueKind::Bool => Ok(key.is_true().to_string()),
        ValueKind::Number if key.is_integer() => Ok(key.to_string()),
        ValueKind::Number => Ok(json_float(f64::try_from(key.clone())?)),
        kind => Err(Error::new(
            ErrorKind::InvalidOperation,
            format!("tojson: a key can't be a value of type {kind}"),
        )),
    }
}

fn json_float(value: f64) -> String {
    match value {
        value if value.is_nan() => "NaN".to_owned(),
        f64::INFINITY => "Infinity".to_owned(),
        f64::NEG_INFINITY => "-Infinity".to_owned(),
        value => float(value),
    }
}

fn quote(out: &mut String, text: &str, ensure_ascii: bool) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            c if c < ' ' || (ensure_ascii && !(' '..='~').contains(&c)) => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    write!(out, "\\u{unit:04x}").expect("a String takes all that is written");
                }
            }
            c => out.push(c),
        }
    }
    out.push('"');
}
