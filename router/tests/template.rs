//! A chat template renders as transformers renders it; expected texts were written by hand after Jinja2's rules.

use serde_json::{Map, Value, json};
use swallow_router::template::{ChatTemplate, Conversation, SpecialTokens, TemplateError};

fn now() -> jiff::Zoned {
    "2024-07-06T09:05:00[UTC]".parse().expect("a time")
}

fn render_with(source: &str, messages: Value, args: Value) -> Result<String, TemplateError> {
    let tokens = SpecialTokens::parse(
        &json!({"bos_token": "<s>", "eos_token": {"content": "</s>"}}),
        &json!({"bos_token": "<other>", "pad_token": "<pad>"}),
    );
    let args: Map<String, Value> = args.as_object().cloned().unwrap_or_default();
    let messages = messages.as_array().cloned().unwrap_or_default();
    let conversation = Conversation {
        messages: &messages,
        add_generation_prompt: true,
        args: &args,
    };
    ChatTemplate::compile(source)?.render(&conversation, &tokens, &now())
}

fn render(source: &str, args: Value) -> String {
    render_with(source, json!([]), args).expect(source)
}

#[test]
fn json_is_what_pythons_dumps_writes() {
    let x = json!({"z": [1, 2.0, true, null], "a": {"日本": "<'\"&\\\n\u{1}\u{7f}>"}, "e": [], "o": {}});
    let args = json!({ "x": x });
    assert_eq!(
        render("{{ x | tojson }}", args.clone()),
        "{\"z\": [1, 2.0, true, null], \"a\": {\"日本\": \"<'\\\"&\\\\\\n\\u0001\u{7f}>\"}, \"e\": [], \"o\": {}}"
    );
    assert_eq!(
        render("{{ x.z | tojson(indent=4) }}", args.clone()),
        "[\n    1,\n    2.0,\n    true,\n    null\n]"
    );
    assert_eq!(
        render(
            "{{ x.e | tojson(indent=2) }}{{ x.o | tojson(indent=2) }}",
            args.clone()
        ),
        "[]{}"
    );
    assert_eq!(
        render("{{ {'k': {'n': 1}} | tojson(indent=2) }}", args.clone()),
        "{\n  \"k\": {\n    \"n\": 1\n  }\n}"
    );
    assert_eq!(
        render("{{ x | tojson(sort_keys=true) }}", json!({"x": {"b": 1, "a": 2}})),
        "{\"a\": 2, \"b\": 1}"
    );
    assert_eq!(
        render("{{ 'é𠮷' | tojson(ensure_ascii=true) }}", args.clone()),
        "\"\\u00e9\\ud842\\udfb7\""
    );
    assert_eq!(
        render("{{ [1, 2] | tojson(separators=(',', ':')) }}", args),
        "[1,2]"
    );
    assert_eq!(
        render("{{ {1: 1.5e300, none: 1} | tojson }}", json!({})),
        "{\"1\": 1.5e+300, \"null\": 1}"
    );
}

#[test]
fn values_print_as_in_python() {
    assert_eq!(
        render(
            "{{ true }} {{ none }} {{ 1.0 }} {{ 3 }} {{ undefined_name }}|",
            json!({})
        ),
        "True None 1.0 3 |"
    );
    let x = json!({"x": ["a", "it's", {"k": null}]});
    assert_eq!(render("{{ x }}", x.clone()), "['a', \"it's\", {'k': None}]");
    assert_eq!(render("{{ x | string | length }}", x), "26");
}

#[test]
fn blocks_take_their_line_with_them() {
    assert_eq!(
        render("a\n  {% if true %}\nb\n  {% endif %}\nc", json!({})),
        "a\nb\nc"
    );
    assert_eq!(
        render("{% for i in [1, 2] -%}\n  {{ i }}\n{%- endfor %}\n", json!({})),
        "12"
    );
    assert_eq!(render("x\n", json!({})), "x");
}

#[test]
fn python_string_methods_slices_and_loop_controls_work() {
    let s = json!({"s": "  ab</think>\n\ncd  "});
    assert_eq!(render("[{{ s.strip() }}]", json!({"s": " x\n"})), "[x]");
    assert_eq!(
        render("[{{ s.split('</think>')[-1].lstrip('\\n').rstrip() }}]", s),
        "[cd]"
    );
    assert_eq!(
        render(
            "{{ 'aXb'.lower() }}{{ 'ab'.upper() }}{{ 'ab'.replace('a', 'c') }}",
            json!({})
        ),
        "axbABcb"
    );
    assert_eq!(
        render("{{ 'abc'.startswith('ab') }}{{ 'b' in 'abc' }}", json!({})),
        "TrueTrue"
    );
    assert_eq!(
        render(
            "{{ [1,2,3][::-1] | join(',') }}{{ 'abc'[1:] }}{{ 'abc'[::-1] }}",
            json!({})
        ),
        "3,2,1bccba"
    );
    assert_eq!(
        render(
            "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 4 %}{% break %}{% endif %}{{ i }}{% endfor %}",
            json!({})
        ),
        "023"
    );
    assert_eq!(
        render(
            "{% set ns = namespace(n=0) %}{% for i in [1,2] %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}",
            json!({})
        ),
        "3"
    );
    let tools = json!({"t": [{"type": "text", "v": 1}, {"type": "image", "v": 2}]});
    assert_eq!(
        render(
            "{{ t | selectattr('type', 'equalto', 'text') | map(attribute='v') | join }}",
            tools.clone()
        ),
        "1"
    );
    assert_eq!(
        render(
            "{% for k, v in t[0] | items %}{{ k }}={{ v }};{% endfor %}",
            tools.clone()
        ),
        "type=text;v=1;"
    );
    assert_eq!(
        render(
            "{% for k, v in t[0].items() %}{{ k }};{% endfor %}{{ t[0].get('x', 'd') }}",
            tools
        ),
        "type;v;d"
    );
    assert_eq!(
        render(
            "{{ 'x' is string }}{{ {} is mapping }}{{ [] is iterable }}{{ y is defined }}",
            json!({})
        ),
        "TrueTrueTrueFalse"
    );
    assert_eq!(
        render("{% macro m(a) %}<{{ a }}>{% endmacro %}{{ m('b') }}", json!({})),
        "<b>"
    );
    assert_eq!(render("{% generation %}g{% endgeneration %}", json!({})), "g");
}

#[test]
fn names_are_those_of_the_reference() {
    assert_eq!(
        render(
            "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ sep_token }}",
            json!({})
        ),
        "<s></s><pad>"
    );
    assert_eq!(
        render(
            "{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}",
            json!({})
        ),
        "TrueTrueTrue"
    );
    assert_eq!(render("{{ strftime_now('%d %b %Y') }}", json!({})), "06 Jul 2024");
    assert_eq!(
        render(
            "{{ strftime_now('%-d %B, %H:%M') if strftime_now is defined }}",
            json!({})
        ),
        "6 July, 09:05"
    );
    assert_eq!(
        render("{{ enable_thinking }}", json!({"enable_thinking": false})),
        "False"
    );
}

#[test]
fn messages_are_read_by_index_and_attribute() {
    let messages = json!([{"role": "system", "content": "s"}, {"role": "user", "content": " u "}]);
    let source = "{% if messages[0]['role'] == 'system' %}{% set messages = messages[1:] %}{% endif %}\
                  {% for message in messages %}{{ message.role }}:{{ message['content'] | trim }}{{ loop.index0 }}{% endfor %}";
    assert_eq!(render_with(source, messages, json!({})).expect(source), "user:u0");
}

#[test]
fn a_template_may_refuse_a_conversation_and_the_client_hears_why() {
    let error = render_with(
        "{{ raise_exception('roles must alternate') }}",
        json!([]),
        json!({}),
    );
    assert_eq!(error, Err(TemplateError::Raised("roles must alternate".into())));
    let nested = "{% macro m() %}{{ raise_exception('deep') }}{% endmacro %}{{ m() }}";
    assert_eq!(
        render_with(nested, json!([]), json!({})),
        Err(TemplateError::Raised("deep".into()))
    );
}

#[test]
fn a_bad_template_or_conversation_is_an_error_with_its_line() {
    let error = ChatTemplate::compile("a\n{% if %}").expect_err("no condition");
    assert!(
        matches!(&error, TemplateError::Compile(why) if why.contains("line 2")),
        "{error}"
    );
    let error = render_with("\n{{ messages[0]['role'] }}", json!([]), json!({})).expect_err("no message");
    assert!(
        matches!(&error, TemplateError::Render(why) if why.contains("line 2")),
        "{error}"
    );
}

#[test]
fn rendering_is_bounded() {
    let bomb = "{% for a in range(9999) %}{% for b in range(9999) %}{{ b }}{% endfor %}{% endfor %}";
    let error = render_with(bomb, json!([]), json!({})).expect_err("too much work");
    assert!(matches!(error, TemplateError::Work(_)), "{error}");
    let mut x = json!(1);
    for _ in 0..120 {
        x = json!([x]);
    }
    assert!(render_with("{{ x | tojson }}", json!([]), json!({ "x": x })).is_err());
}

#[test]
fn what_a_template_reads_is_known() {
    let reads = |source: &str| ChatTemplate::compile(source).expect(source).reads("tools");
    assert!(reads(
        "{% if tools is defined and tools is not none %}x{% endif %}"
    ));
    assert!(reads(
        "{%- if custom_tools is defined %}{%- set tools = custom_tools %}{%- endif %}\
         {%- if not tools is defined %}{%- set tools = none %}{%- endif %}{%- for t in tools %}{{ t }}{%- endfor %}"
    ));
    assert!(!reads("{% for m in messages %}{{ m.tools }}{% endfor %}tools"));
    assert!(!reads("{% set tools = [] %}{{ tools }}"));
    let shows = |source: &str| ChatTemplate::compile(source).expect(source).shows_calls();
    assert!(shows("{{ messages[0].tool_calls }}") && !shows("{{ messages }}"));
}
