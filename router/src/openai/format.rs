//! What an output must look like, in the three ways in which clients say it: `response_format`, and vLLM's
//! `structured_outputs` and its older `guided_*`.

use serde_json::{Map, Value, json};

use super::fields::Fields;
use crate::{ask::Grammar, generate::Invalid};

/// The one that is given, if any.
pub(super) fn grammar(fields: &mut Fields) -> Result<Option<Grammar>, Invalid> {
    let mut given = Vec::new();
    given.extend(response_format(fields)?.map(|grammar| ("response_format", grammar)));
    given.extend(structured_outputs(fields)?.map(|grammar| ("structured_outputs", grammar)));
    given.extend(json_schema("guided_json", fields.take("guided_json"))?.map(|g| ("guided_json", g)));
    given.extend(
        fields
            .string("guided_regex")?
            .map(|r| ("guided_regex", Grammar::Regex(r))),
    );
    let choice = fields.take("guided_choice");
    given.extend(choices("guided_choice", choice)?.map(|g| ("guided_choice", g)));
    given.extend(
        fields
            .string("guided_grammar")?
            .map(|g| ("guided_grammar", Grammar::Lark(g))),
    );
    one(given)
}

/// Two of them would have to be intersected.
fn one(given: Vec<(&'static str, Grammar)>) -> Result<Option<Grammar>, Invalid> {
    if let [(first, _), (second, _), ..] = &given[..] {
        let why = format!("can't be given beside {first}: an output follows one grammar");
        return Err(Invalid::new(*second, why));
    }
    Ok(given.into_iter().next().map(|(_, grammar)| grammar))
}

fn response_format(fields: &mut Fields) -> Result<Option<Grammar>, Invalid> {
    const NAME: &str = "response_format";
    let Some(format) = fields.object(NAME)? else {
        return Ok(None);
    };
    let mut format = fields.inner(format);
    let within = |invalid: Invalid| Invalid::new(format!("{NAME}.{}", invalid.field), invalid.why);
    let missing = |field: &str| Invalid::new(format!("{NAME}.{field}"), "is missing");
    let kind = format.string("type").map_err(within)?;
    let grammar = match kind.as_deref() {
        None => return Err(missing("type")),
        Some("text") => None,
        Some("json_object") => Some(any_object()),
        Some("json_schema") => {
            let schema = format.object("json_schema").map_err(within)?;
            let mut schema = format.inner(schema.ok_or_else(|| missing("json_schema"))?);
            // Without one, any JSON will do.
            let grammar = json_schema("response_format.json_schema.schema", schema.take("schema"))?;
            format.left_over("json_schema", schema, &["name", "description", "strict"]);
            Some(grammar.unwrap_or_else(|| Grammar::JsonSchema("{}".to_owned())))
        }
        Some("regex") => {
            let regex = format.string("regex").map_err(within)?;
            Some(Grammar::Regex(regex.ok_or_else(|| missing("regex"))?))
        }
        Some("grammar") => {
            let lark = format.string("grammar").map_err(within)?;
            Some(Grammar::Lark(lark.ok_or_else(|| missing("grammar"))?))
        }
        Some(other) => {
            let why = format!(
                "'{other}' is not supported; there are text, json_object, json_schema, regex and grammar"
            );
            return Err(Invalid::unsupported(format!("{NAME}.type"), why));
        }
    };
    fields.left_over(NAME, format, &[]);
    Ok(grammar)
}

fn structured_outputs(fields: &mut Fields) -> Result<Option<Grammar>, Invalid> {
    const NAME: &str = "structured_outputs";
    let Some(asked) = fields.object(NAME)? else {
        return Ok(None);
    };
    let mut asked = fields.inner(asked);
    let mut given = Vec::new();
    given.extend(json_schema("structured_outputs.json", asked.take("json"))?.map(|g| ("json", g)));
    let text = |asked: &mut Fields, name: &'static str| {
        let text = asked.string(name);
        text.map_err(|invalid| Invalid::new(format!("{NAME}.{name}"), invalid.why))
    };
    given.extend(text(&mut asked, "regex")?.map(|regex| ("regex", Grammar::Regex(regex))));
    given.extend(text(&mut asked, "grammar")?.map(|lark| ("grammar", Grammar::Lark(lark))));
    given.extend(choices("structured_outputs.choice", asked.take("choice"))?.map(|g| ("choice", g)));
    match asked.take("json_object") {
        None | Some(Value::Bool(false)) => {}
        Some(Value::Bool(true)) => given.push(("json_object", any_object())),
        Some(_) => {
            let why = "must be true or false";
            return Err(Invalid::new("structured_outputs.json_object", why));
        }
    }
    for unserved in ["structural_tag", "whitespace_pattern"] {
        if asked.take(unserved).is_some() {
            let why = "is not supported; give json, regex, choice, grammar or json_object";
            return Err(Invalid::unsupported(format!("{NAME}.{unserved}"), why));
        }
    }
    let grammar =
        one(given).map_err(|invalid| Invalid::new(format!("{NAME}.{}", invalid.field), invalid.why))?;
    fields.left_over(NAME, asked, &["disable_fallback"]);
    Ok(grammar)
}

fn any_object() -> Grammar {
    Grammar::JsonSchema(json!({"type": "object"}).to_string())
}

/// A schema as an object, or as text that holds one; true and false are schemas too.
fn json_schema(field: &'static str, value: Option<Value>) -> Result<Option<Grammar>, Invalid> {
    let schema = match value {
        None => return Ok(None),
        Some(Value::String(text)) => serde_json::from_str::<Map<String, Value>>(&text)
            .map(Value::Object)
            .map_err(|error| Invalid::new(field, format!("must hold a JSON schema: {error}")))?,
        Some(schema @ (Value::Object(_) | Value::Bool(_))) => schema,
        Some(_) => return Err(Invalid::new(field, "must be a JSON schema")),
    };
    Ok(Some(Grammar::JsonSchema(schema.to_string())))
}

fn choices(field: &'static str, value: Option<Value>) -> Result<Option<Grammar>, Invalid> {
    let Some(value) = value else { return Ok(None) };
    let texts = value.as_array().filter(|texts| !texts.is_empty());
    let texts: Option<Vec<String>> = texts.and_then(|texts| {
        let quoted = |text: &Value| {
            text.as_str()
                .filter(|text| !text.is_empty())
                // The notation's texts are JSON's, but for DEL.
                .map(|_| text.to_string().replace('\u{7f}', "\\u007f"))
        };
        texts.iter().map(quoted).collect()
    });
    let texts = texts.ok_or_else(|| Invalid::new(field, "must be a list of texts, none of them empty"))?;
    Ok(Some(Grammar::Lark(format!("start: {}", texts.join(" | ")))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::openai::known::Page;

    fn read(body: &Value) -> Result<(Option<Grammar>, Vec<String>), Invalid> {
        let mut fields = Fields::parse(Page::Chat, body.to_string().as_bytes())?;
        let grammar = grammar(&mut fields)?;
        Ok((grammar, fields.finish()?))
    }

    #[test]
    fn each_way_of_saying_it_is_understood() {
        let schema = json!({"type": "object", "properties": {"z": {}, "a": {}}});
        let as_schema = || Some(Grammar::JsonSchema(schema.to_string()));
        let object = || Some(Grammar::JsonSchema(r#"{"type":"object"}"#.into()));
        let ab = || Some(Grammar::Lark(r#"start: "a" | "\"b""#.into()));
        for (body, expected) in [
            (json!({}), None),
            (json!({"response_format": {"type": "text"}}), None),
            (json!({"response_format": {"type": "json_object"}}), object()),
            (
                json!({"response_format": {"type": "json_schema", "json_schema":
                    {"name": "n", "strict": true, "description": "d", "schema": schema}}}),
                as_schema(),
            ),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}}),
                Some(Grammar::JsonSchema("{}".into())),
            ),
            (
                json!({"response_format": {"type": "regex", "regex": "a+"}}),
                Some(Grammar::Regex("a+".into())),
            ),
            (
                json!({"response_format": {"type": "grammar", "grammar": "start: \"a\""}}),
                Some(Grammar::Lark("start: \"a\"".into())),
            ),
            (
                json!({"structured_outputs": {"json": schema.to_string()}}),
                as_schema(),
            ),
            (
                json!({"structured_outputs": {"choice": ["a", "\"b"], "disable_fallback": true}}),
                ab(),
            ),
            (
                json!({"structured_outputs": {"json_object": true, "regex": null}}),
                object(),
            ),
            (json!({"structured_outputs": {}}), None),
            (json!({"guided_json": schema}), as_schema()),
            (json!({"guided_choice": ["a", "\"b"]}), ab()),
            (json!({"guided_regex": "a"}), Some(Grammar::Regex("a".into()))),
            (
                json!({"guided_grammar": "start: X"}),
                Some(Grammar::Lark("start: X".into())),
            ),
        ] {
            assert_eq!(read(&body), Ok((expected, Vec::new())), "{body}");
        }
        let odd = json!({"response_format": {"type": "json_object", "colour": 1}});
        assert_eq!(read(&odd).expect("sound").1, ["response_format.colour"]);
    }

    #[test]
    fn what_is_no_grammar_is_refused_by_the_name_of_its_place() {
        for (body, field) in [
            (json!({"response_format": 1}), "response_format"),
            (json!({"response_format": {}}), "response_format.type"),
            (
                json!({"response_format": {"type": "xml"}}),
                "response_format.type",
            ),
            (
                json!({"response_format": {"type": "regex"}}),
                "response_format.regex",
            ),
            (
                json!({"response_format": {"type": "json_schema"}}),
                "response_format.json_schema",
            ),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": {"schema": 3}}}),
                "response_format.json_schema.schema",
            ),
            (
                json!({"structured_outputs": {"regex": 1}}),
                "structured_outputs.regex",
            ),
            (
                json!({"structured_outputs": {"choice": []}}),
                "structured_outputs.choice",
            ),
            (
                json!({"structured_outputs": {"structural_tag": {}}}),
                "structured_outputs.structural_tag",
            ),
            (
                json!({"structured_outputs": {"regex": "a", "json_object": true}}),
                "structured_outputs.json_object",
            ),
            (json!({"guided_json": "{"}), "guided_json"),
            (json!({"guided_choice": ["a", ""]}), "guided_choice"),
            (
                json!({"response_format": {"type": "json_object"}, "guided_regex": "a"}),
                "guided_regex",
            ),
        ] {
            assert_eq!(read(&body).expect_err(field).field, field, "{body}");
        }
    }
}
