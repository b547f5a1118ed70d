//! Functions that the model may call, over gRPC: the template is told, and calls come whole and in pieces.

use swallow_router::ask::Grammar;
use wire::{stream_chat_response::Event, tool_choice};

use super::*;
use crate::support::engine::start_with_template;

const TEMPLATE: &str = "{% if tools is not none %}T{{ tools[0].function.name }}{% endif %}{% for m in messages %}\
    {% if m.tool_calls %}C{{ m.tool_calls[0].function.arguments | tojson }}{% else %}{{ m.role[0] }}{{ m.content }}\
    {% endif %}{% endfor %}";
const CALL: &str = r#"{"name": "weather", "parameters": {"city": "東京", "days": 2}}"#;
const ARGUMENTS: &str = r#"{"city": "東京", "days": 2}"#;

fn request() -> wire::ChatRequest {
    let weather = wire::Tool {
        name: "weather".into(),
        description: "d".into(),
        parameters: r#"{"type": "object", "properties": {"city": {"type": "string"}}}"#.into(),
    };
    wire::ChatRequest {
        model: "tiny".into(),
        messages: user("q"),
        tools: vec![weather],
        ..wire::ChatRequest::default()
    }
}

fn chosen(choice: tool_choice::Choice) -> wire::ChatRequest {
    let tool_choice = Some(wire::ToolChoice { choice: Some(choice) });
    wire::ChatRequest {
        tool_choice,
        ..request()
    }
}

async fn whole(router: &Router, request: wire::ChatRequest) -> wire::chat_response::Candidate {
    let answer = ChatServiceClient::new(channel(router).await).chat(request).await;
    answer.expect("an answer").into_inner().candidates.remove(0)
}

async fn streamed(router: &Router, request: wire::ChatRequest) -> Vec<Event> {
    let request = wire::StreamChatRequest {
        chat: Some(request),
        stream: Some(wire::StreamOptions { token_ids: true }),
    };
    let answer = ChatServiceClient::new(channel(router).await)
        .stream_chat(request)
        .await;
    let messages: Vec<_> = answer.expect("accepted").into_inner().collect().await;
    let messages = messages.into_iter().map(|message| message.expect("no error"));
    (1..)
        .zip(messages)
        .map(|(n, message)| {
            assert_eq!(message.sequence, n, "dense from 1");
            message.event.expect("an event")
        })
        .collect()
}

#[tokio::test]
async fn a_call_is_told_whole_and_in_pieces() {
    let router = start_with_template(TEMPLATE, |ask| says(ask, CALL)).await;
    let candidate = whole(&router, request()).await;
    let finish = candidate.finish.expect("an end");
    assert_eq!(finish.reason(), wire::FinishReason::ToolCalls);
    assert_eq!(finish.matched, Some(Matched::TokenId(EOS)));
    let message = candidate.message.expect("a message");
    assert_eq!(message.content, "");
    let call = &message.tool_calls[0];
    assert!(call.id.starts_with("call_"), "{call:?}");
    assert_eq!(
        (call.name.as_str(), call.arguments.as_str()),
        ("weather", ARGUMENTS)
    );
    assert_eq!(
        router.seen.ask().prompt[..],
        ids("Tweatheruq")[..],
        "the model is told"
    );
    assert_eq!(router.seen.ask().grammar, None, "and decides");

    let two = wire::ChatRequest {
        candidate_count: 2,
        ..request()
    };
    let events = streamed(&router, two).await;
    for index in 0..2 {
        let calls: Vec<&wire::stream_chat_response::ToolCallDelta> = events
            .iter()
            .filter_map(|event| match event {
                Event::ToolCallDelta(delta) if delta.index == index => Some(delta),
                _ => None,
            })
            .collect();
        assert_eq!(calls[0].name, "weather");
        assert!(calls[0].id.starts_with("call_") && calls[1].id.is_empty());
        assert!(calls.len() > 10, "arguments come as they are generated");
        let arguments: String = calls.iter().map(|call| call.arguments.as_str()).collect();
        assert_eq!(arguments, ARGUMENTS);
        assert!(calls.iter().all(|call| call.call == 0));
        let deltas = || {
            events.iter().filter_map(move |event| match event {
                Event::Delta(delta) if delta.index == index => Some(delta),
                _ => None,
            })
        };
        assert!(deltas().all(|delta| delta.text.is_empty()), "a call is no text");
        let told: Vec<u32> = deltas().flat_map(|delta| delta.token_ids.clone()).collect();
        assert_eq!(told[..CALL.len()], ids(CALL), "every token, told or withheld");
        let ends = |event: &&Event| matches!(event, Event::CandidateFinished(end) if end.index == index);
        let Some(Event::CandidateFinished(end)) = events.iter().find(ends) else {
            panic!("candidate {index} does not end")
        };
        let finish = end.finish.as_ref().expect("a reason");
        assert_eq!(finish.reason(), wire::FinishReason::ToolCalls);
    }
    assert!(matches!(events.last(), Some(Event::Completed(_))));
}

#[tokio::test]
async fn words_before_no_call_stay_words_and_a_cut_call_keeps_what_came() {
    let answer = r#"{"weather": "fine"} I think."#;
    let router = start_with_template(TEMPLATE, move |ask| says(ask, answer)).await;
    let candidate = whole(&router, request()).await;
    let message = candidate.message.expect("a message");
    assert_eq!((message.content.as_str(), message.tool_calls.len()), (answer, 0));
    assert_eq!(
        candidate.finish.expect("an end").reason(),
        wire::FinishReason::Eos
    );
    let text: String = streamed(&router, request())
        .await
        .iter()
        .filter_map(|event| match event {
            Event::Delta(delta) => Some(delta.text.as_str()),
            Event::ToolCallDelta(delta) => panic!("no call: {delta:?}"),
            _ => None,
        })
        .collect();
    assert_eq!(text, answer);

    let stop = wire::StopCriteria {
        max_output_tokens: Some(45),
        ..wire::StopCriteria::default()
    };
    let cut = wire::ChatRequest {
        stop: Some(stop),
        ..request()
    };
    let router = start_with_template(TEMPLATE, |ask| says(ask, CALL)).await;
    let candidate = whole(&router, cut).await;
    assert_eq!(
        candidate.finish.expect("an end").reason(),
        wire::FinishReason::Length
    );
    assert_eq!(
        candidate.message.expect("a message").tool_calls[0].name,
        "weather"
    );

    let two_calls = r#"{"name": "weather", "parameters": {}}; {"name": "weather", "parameters": {"n": 2}}"#;
    let router = start_with_template(TEMPLATE, move |ask| says(ask, two_calls)).await;
    for (single_tool_call, n_calls) in [(false, 2), (true, 1)] {
        let asked = wire::ChatRequest {
            single_tool_call,
            ..request()
        };
        let message = whole(&router, asked).await.message.expect("a message");
        assert_eq!(message.tool_calls.len(), n_calls);
    }
}

#[tokio::test]
async fn the_choice_hides_the_tools_or_binds_the_answer() {
    use tool_choice::{Choice, Mode};
    let router = start_with_template(TEMPLATE, |ask| says(ask, CALL)).await;
    let hidden = whole(&router, chosen(Choice::Mode(Mode::None.into()))).await;
    let message = hidden.message.expect("a message");
    assert_eq!((message.content.as_str(), message.tool_calls.len()), (CALL, 0));
    assert_eq!(router.seen.ask().prompt[..], ids("uq")[..]);
    for choice in [
        Choice::Mode(Mode::Required.into()),
        Choice::Name("weather".into()),
    ] {
        let candidate = whole(&router, chosen(choice)).await;
        assert_eq!(
            candidate.finish.expect("an end").reason(),
            wire::FinishReason::ToolCalls
        );
        let grammar = router.seen.ask().grammar.expect("the answer must be a call");
        assert!(
            matches!(&*grammar, Grammar::JsonSchema(schema) if schema.contains(r#"{"const":"weather"}"#)),
            "{grammar:?}"
        );
    }
}

#[tokio::test]
async fn a_conversation_goes_on_after_a_call() {
    let router = start_with_template(TEMPLATE, |ask| says(ask, "fine")).await;
    let call = wire::ToolCall {
        id: "c1".into(),
        name: "weather".into(),
        arguments: r#"{"city": "A"}"#.into(),
    };
    let message = |role: wire::Role, content: &str| wire::ChatMessage {
        role: role.into(),
        content: content.into(),
        ..wire::ChatMessage::default()
    };
    let called = wire::ChatMessage {
        tool_calls: vec![call],
        ..message(wire::Role::Assistant, "")
    };
    let answered = wire::ChatMessage {
        tool_call_id: "c1".into(),
        ..message(wire::Role::Tool, "sunny")
    };
    let messages = vec![message(wire::Role::User, "q"), called, answered];
    let asked = wire::ChatRequest {
        messages: messages.clone(),
        ..request()
    };
    let message = whole(&router, asked.clone()).await.message.expect("a message");
    assert_eq!(message.content, "fine");
    let seen = router.seen.ask().prompt.to_vec();
    assert_eq!(seen, ids("TweatheruqC{\"city\": \"A\"}tsunny"));
    let conversation = wire::tokenize_request::Conversation {
        messages: messages.clone(),
        tools: request().tools,
    };
    let counted = wire::TokenizeRequest {
        model: "tiny".into(),
        input: Some(Input::Conversation(conversation)),
        ..wire::TokenizeRequest::default()
    };
    let tokens = TokenizationServiceClient::new(channel(&router).await)
        .tokenize(counted)
        .await;
    assert_eq!(tokens.expect("ids").into_inner().tokens.expect("ids").ids, seen);
}

#[tokio::test]
async fn what_is_wrong_with_tools_is_named_in_the_wires_own_terms() {
    use tool_choice::{Choice, Mode};
    let router = start_with_template(TEMPLATE, |ask| says(ask, CALL)).await;
    let mut client = ChatServiceClient::new(channel(&router).await);
    let tool = |name: &str, parameters: &str| wire::Tool {
        name: name.into(),
        parameters: parameters.into(),
        ..wire::Tool::default()
    };
    let with = |tools| wire::ChatRequest { tools, ..request() };
    let said = |role: wire::Role, arguments: &str| {
        let call = wire::ToolCall {
            name: "weather".into(),
            arguments: arguments.into(),
            ..wire::ToolCall::default()
        };
        let messages = vec![wire::ChatMessage {
            role: role.into(),
            tool_calls: vec![call],
            ..wire::ChatMessage::default()
        }];
        wire::ChatRequest {
            messages,
            ..request()
        }
    };
    for (asked, field) in [
        (with(vec![tool("a b", "")]), "tools[0].name"),
        (with(vec![tool("f", "{")]), "tools[0].parameters"),
        (with(vec![tool("f", "3")]), "tools[0].parameters"),
        (with(vec![tool("f", ""), tool("f", "")]), "tools[1].name"),
        (chosen(Choice::Name("g".into())), "tool_choice"),
        (chosen(Choice::Mode(9)), "tool_choice"),
        (
            wire::ChatRequest {
                tools: vec![],
                ..chosen(Choice::Mode(Mode::Required.into()))
            },
            "tool_choice",
        ),
        (
            said(wire::Role::Assistant, "[1]"),
            "messages[0].tool_calls[0].arguments",
        ),
        (said(wire::Role::User, ""), "messages[0].tool_calls"),
    ] {
        let status = client.chat(asked).await.expect_err(field);
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        let details = status.get_error_details();
        let violations = details.bad_request().expect("a field").field_violations.clone();
        assert_eq!(violations[0].field, field, "{status}");
    }
    // The model's own template, which reads no tools.
    let router = start(|ask| says(ask, "x")).await;
    let status = ChatServiceClient::new(channel(&router).await)
        .chat(request())
        .await
        .expect_err("refused");
    assert!(
        status.message().contains("template does not read tools"),
        "{status}"
    );
}
