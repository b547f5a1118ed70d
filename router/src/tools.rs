//! Functions that the model may call: what a request says of them, what the template sees, and the grammar of an answer
//! that has to be a call.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use crate::{
    ask::Grammar,
    generate::{Chat, Invalid},
};

const MAX_TOOLS: usize = 128;
const MAX_NAME: usize = 64;

/// What a request says of tools.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Tools {
    /// As the client gave them.
    list: Vec<Value>,
    names: Vec<String>,
    choice: Choice,
}

/// What a client wants done with them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Choice {
    /// The model is not told of any.
    None,
    /// It decides.
    Auto,
    /// It calls one of them.
    Required,
    /// It calls this one.
    Named(String),
}

impl Tools {
    /// Functions as OpenAI writes them; without a choice the model decides.
    pub(crate) fn new(list: Vec<Value>) -> Result<Self, Invalid> {
        if list.len() > MAX_TOOLS {
            return Err(Invalid::new("tools", format!("must be at most {MAX_TOOLS}")));
        }
        let names = list
            .iter()
            .enumerate()
            .map(|(i, tool)| name(i, tool))
            .collect::<Result<Vec<String>, Invalid>>()?;
        if let Some(i) = (1..names.len()).find(|&i| names[..i].contains(&names[i])) {
            let why = format!("'{}' is the name of an earlier one too", names[i]);
            return Err(Invalid::new(format!("tools[{i}].function.name"), why));
        }
        Ok(Self {
            choice: if list.is_empty() {
                Choice::None
            } else {
                Choice::Auto
            },
            list,
            names,
        })
    }

    /// And what the client wants done with them.
    pub(crate) fn choose(&mut self, choice: Choice) -> Result<(), Invalid> {
        const FIELD: &str = "tool_choice";
        if let Choice::Named(name) = &choice
            && !self.names.contains(name)
        {
            let why = format!("names '{name}', which is not among tools");
            return Err(Invalid::new(FIELD, why));
        }
        if self.list.is_empty() && choice != Choice::None {
            return Err(Invalid::new(FIELD, "needs tools"));
        }
        self.choice = choice;
        Ok(())
    }

    /// What the model may call; nothing: its answer is a text.
    pub(crate) fn callable(&self) -> &[String] {
        if self.choice == Choice::None {
            &[]
        } else {
            &self.names
        }
    }

    /// Lets the conversation's template see them.
    pub(crate) fn show(&self, chat: &mut Chat) {
        if self.choice != Choice::None {
            let tools = Value::Array(self.list.clone());
            chat.args.insert("tools".to_owned(), tools);
        }
    }

    /// The output's grammar, where it has to be a call: one of the allowed ones, as Llama 3 writes it.
    pub(crate) fn grammar(&self, given: Option<Arc<Grammar>>) -> Result<Option<Arc<Grammar>>, Invalid> {
        if given.is_some() && self.choice != Choice::None {
            let why = "can't be given beside tools: an output that follows it can't be a call; set tool_choice to none";
            return Err(Invalid::new("response_format", why));
        }
        let allowed = |name: &str| match &self.choice {
            Choice::None | Choice::Auto => false,
            Choice::Required => true,
            Choice::Named(only) => only == name,
        };
        let calls: Vec<Value> = self
            .names
            .iter()
            .zip(&self.list)
            .filter(|(name, _)| allowed(name))
            .enumerate()
            .map(|(i, (name, tool))| call(i, name, &tool["function"]))
            .collect();
        if calls.is_empty() {
            return Ok(given);
        }
        // Spaced as Llama 3 was trained to write calls, and not otherwise.
        let spacing = json!({"whitespace_flexible": false, "item_separator": ", ", "key_separator": ": "});
        let schema = json!({"anyOf": calls, "x-guidance": spacing});
        Ok(Some(Arc::new(Grammar::JsonSchema(schema.to_string()))))
    }
}

fn name(i: usize, tool: &Value) -> Result<String, Invalid> {
    let field = |name: &str| format!("tools[{i}].{name}");
    if tool["type"] != "function" {
        return Err(Invalid::unsupported(field("type"), "must be 'function'"));
    }
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
    match tool["function"]["name"].as_str() {
        Some(name) if !name.is_empty() && name.len() <= MAX_NAME && name.chars().all(plain) => {}
        _ => {
            let why = format!("must be 1 to {MAX_NAME} letters, digits, '_', '-' and '.'");
            return Err(Invalid::new(field("function.name"), why));
        }
    }
    if !matches!(tool["function"]["parameters"], Value::Null | Value::Object(_)) {
        return Err(Invalid::new(
            field("function.parameters"),
            "must be a JSON schema",
        ));
    }
    Ok(tool["function"]["name"].as_str().unwrap_or_default().to_owned())
}

/// The schema of a call, the `i`-th alternative.
fn call(i: usize, name: &str, function: &Value) -> Value {
    let mut parameters = function["parameters"].clone();
    if parameters.is_null() {
        parameters = json!({"type": "object", "additionalProperties": false});
    }
    move_references(&mut parameters, &format!("#/anyOf/{i}/properties/parameters"));
    json!({"type": "object", "additionalProperties": false, "required": ["name", "parameters"],
           "properties": {"name": {"const": name}, "parameters": parameters}})
}

/// References are from the root, which is further out now.
fn move_references(schema: &mut Value, root: &str) {
    match schema {
        Value::Object(fields) => {
            if let Some(Value::String(reference)) = fields.get_mut("$ref")
                && let Some(path) = reference.strip_prefix('#')
            {
                *reference = format!("{root}{path}");
            }
            fields.values_mut().for_each(|inner| move_references(inner, root));
        }
        Value::Array(items) => items.iter_mut().for_each(|inner| move_references(inner, root)),
        _ => {}
    }
}

/// The calls of an earlier answer, with arguments as templates want them: as objects.
pub(crate) fn earlier_calls(field: &str, calls: Vec<Value>) -> Result<Value, Invalid> {
    let call = |(i, mut call): (usize, Value)| {
        let invalid = |what: &str, why: &str| Invalid::new(format!("{field}[{i}].{what}"), why);
        if call["function"]["name"].as_str().is_none() {
            return Err(invalid("function.name", "must be a string"));
        }
        let arguments = match &call["function"]["arguments"] {
            Value::Null => Map::new(),
            Value::Object(arguments) => arguments.clone(),
            Value::String(text) if text.trim().is_empty() => Map::new(),
            Value::String(text) => serde_json::from_str(text)
                .map_err(|_| invalid("function.arguments", "must hold a JSON object"))?,
            _ => {
                return Err(invalid(
                    "function.arguments",
                    "must be a string that holds a JSON object",
                ));
            }
        };
        call["function"]["arguments"] = Value::Object(arguments);
        Ok(call)
    };
    calls.into_iter().enumerate().map(call).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(tools: &Value, choice: Choice) -> Result<Tools, Invalid> {
        let mut tools = Tools::new(tools.as_array().expect("a list").clone())?;
        tools.choose(choice)?;
        Ok(tools)
    }

    fn function(name: &str, parameters: Value) -> Value {
        json!({"type": "function", "function": {"name": name, "parameters": parameters}})
    }

    #[test]
    fn an_answer_that_must_be_a_call_has_a_grammar() {
        let place =
            json!({"type": "object", "properties": {"at": {"$ref": "#/$defs/at"}}, "$defs": {"at": {}}});
        let tools = json!([function("now", Value::Null), function("look", place)]);
        let grammar = |choice: Choice| {
            let tools = chosen(&tools, choice).expect("sound");
            match tools.grammar(None).expect("one grammar").as_deref() {
                Some(Grammar::JsonSchema(schema)) => serde_json::from_str(schema).expect("JSON"),
                _ => Value::Null,
            }
        };
        assert_eq!(grammar(Choice::Auto), Value::Null);
        let all = grammar(Choice::Required);
        assert_eq!(all["anyOf"][0]["properties"]["name"]["const"], "now");
        let parameters = &all["anyOf"][1]["properties"]["parameters"];
        assert_eq!(
            parameters["properties"]["at"]["$ref"],
            "#/anyOf/1/properties/parameters/$defs/at"
        );
        let one = grammar(Choice::Named("look".into()));
        assert_eq!(one["anyOf"].as_array().map(Vec::len), Some(1));
        assert_eq!(one["anyOf"][0]["properties"]["name"]["const"], "look");
        let none = chosen(&tools, Choice::None).expect("sound");
        assert!(none.callable().is_empty());
        let regex = Some(Arc::new(Grammar::Regex("a".into())));
        assert_eq!(none.grammar(regex.clone()), Ok(regex.clone()));
        let both = chosen(&tools, Choice::Auto).expect("sound");
        assert_eq!(both.grammar(regex).expect_err("two").field, "response_format");
    }

    #[test]
    fn what_is_no_tool_is_refused_by_its_place() {
        let f = function("f", Value::Null);
        let many: Vec<Value> = (0..=MAX_TOOLS)
            .map(|i| function(&format!("f{i}"), Value::Null))
            .collect();
        for (tools, choice, field) in [
            (json!([{"type": "web"}]), Choice::Auto, "tools[0].type"),
            (json!([f, f]), Choice::Auto, "tools[1].function.name"),
            (
                json!([function("a b", Value::Null)]),
                Choice::Auto,
                "tools[0].function.name",
            ),
            (
                json!([function("f", json!(3))]),
                Choice::Auto,
                "tools[0].function.parameters",
            ),
            (json!(many), Choice::Auto, "tools"),
            (json!([]), Choice::Auto, "tool_choice"),
            (json!([f]), Choice::Named("g".into()), "tool_choice"),
        ] {
            assert_eq!(chosen(&tools, choice).expect_err(field).field, field, "{tools}");
        }
        let none = chosen(&json!([]), Choice::None).expect("nothing");
        assert_eq!(none.callable(), [""; 0]);
    }

    #[test]
    fn earlier_arguments_become_objects() {
        let call =
            |arguments: Value| vec![json!({"id": "c", "function": {"name": "f", "arguments": arguments}})];
        let read = earlier_calls("x", call(json!("{\"a\": 1}"))).expect("sound");
        assert_eq!(read[0]["function"]["arguments"], json!({"a": 1}));
        assert_eq!(
            earlier_calls("x", call(json!(""))).expect("sound")[0]["function"]["arguments"],
            json!({})
        );
        let error = earlier_calls("x", call(json!("[1]"))).expect_err("a list");
        assert_eq!(error.field, "x[0].function.arguments");
    }
}
