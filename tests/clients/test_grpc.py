"""Generated Python stubs against the main job: chat and generation, unary and streamed, health, errors, deadlines."""

import json
import re
import time

import grpc
import pytest

QUESTION = "12足す30はいくつですか。"


def chat_request(stubs, question=QUESTION, **more):
    message = stubs.chat.ChatMessage(role=stubs.chat.ROLE_USER, content=question)
    sampling = stubs.common.SamplingParams(temperature=0)
    return stubs.chat.ChatRequest(model="tiny", messages=[message], sampling=sampling, **more)


def test_a_streamed_chat_is_the_unary_one(stubs, channel):
    service = stubs.chat_grpc.ChatServiceStub(channel)
    whole = service.Chat(chat_request(stubs), timeout=60)
    assert whole.candidates[0].message.content.strip()
    events = list(service.StreamChat(stubs.chat.StreamChatRequest(chat=chat_request(stubs)), timeout=60))
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds[0] == "started" and kinds[-1] == "completed" and kinds[-2] == "candidate_finished"
    text = "".join(event.delta.text for event in events)
    assert text == whole.candidates[0].message.content
    assert events[-1].completed.usage.output_tokens == whole.usage.output_tokens


def test_generate_takes_text_and_ids_and_gives_both(stubs, channel):
    tokens = stubs.model_grpc.TokenizationServiceStub(channel).Tokenize(
        stubs.model.TokenizeRequest(model="models/tiny", text="東京"), timeout=60
    ).tokens
    service = stubs.generation_grpc.GenerationServiceStub(channel)
    stop = stubs.common.StopCriteria(max_output_tokens=6)
    sampling = stubs.common.SamplingParams(temperature=0)
    logprobs = stubs.common.LogprobOptions(output=True, top_n=2, prompt=True)
    common = {"model": "tiny", "stop": stop, "sampling": sampling, "logprobs": logprobs}
    by_text = service.Generate(stubs.generation.GenerateRequest(text="東京", **common), timeout=60)
    by_ids = service.Generate(stubs.generation.GenerateRequest(token_ids=tokens, **common), timeout=60)
    assert list(by_text.candidates[0].token_ids) == list(by_ids.candidates[0].token_ids)
    assert len(by_text.prompt_logprobs) == len(tokens.ids)
    assert not by_text.prompt_logprobs[0].HasField("logprob")
    first = by_text.candidates[0].logprobs[0]
    assert first.rank == 1 and first.top[0].logprob == first.logprob


def test_models_and_health(stubs, channel):
    models = stubs.model_grpc.ModelServiceStub(channel).ListModels(stubs.model.ListModelsRequest(), timeout=10).models
    by_name = {model.name: model for model in models}
    assert by_name["models/tiny"].ready_replicas == 2
    assert by_name["models/tiny"].max_context_tokens == 8192
    assert list(by_name["models/tiny"].aliases) == ["swallow-tiny"]


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"model": "nobody"}, grpc.StatusCode.NOT_FOUND, "nobody"),
        ({"candidate_count": 1000}, grpc.StatusCode.INVALID_ARGUMENT, "candidate_count"),
    ],
)
def test_mistakes_have_their_code(stubs, channel, change, code, words):
    request = chat_request(stubs)
    for name, value in change.items():
        setattr(request, name, value)
    with pytest.raises(grpc.RpcError) as error:
        stubs.chat_grpc.ChatServiceStub(channel).Chat(request, timeout=60)
    assert error.value.code() == code
    assert words in error.value.details()


def test_a_deadline_binds_a_stream(stubs, channel):
    request = stubs.generation.GenerateRequest(model="tiny", text="1")
    request.stop.max_output_tokens = 8000
    request.stop.ignore_eos = True
    start = time.monotonic()
    with pytest.raises(grpc.RpcError) as error:
        for _ in stubs.generation_grpc.GenerationServiceStub(channel).StreamGenerate(
            stubs.generation.StreamGenerateRequest(generate=request), timeout=0.7
        ):
            pass
    assert error.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert time.monotonic() - start < 5


def test_a_generation_follows_its_grammar(stubs, channel):
    service = stubs.generation_grpc.GenerationServiceStub(channel)
    sampling = stubs.common.SamplingParams(temperature=1, seed=11)
    common = {"model": "tiny", "text": "2 + 2 =", "sampling": sampling, "candidate_count": 3}
    grammar = stubs.common.Grammar(regex="(春|夏)[0-9]{1,2}")
    answer = service.Generate(stubs.generation.GenerateRequest(grammar=grammar, **common), timeout=60)
    for candidate in answer.candidates:
        assert re.fullmatch("(春|夏)[0-9]{1,2}", candidate.text), candidate.text
    with pytest.raises(grpc.RpcError) as error:
        bad = stubs.common.Grammar(json_schema='{"type": "nothing"}')
        service.Generate(stubs.generation.GenerateRequest(grammar=bad, **common), timeout=60)
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "nothing" in error.value.details()


def test_a_conversation_goes_on_with_its_last_message(stubs, channel):
    service = stubs.chat_grpc.ChatServiceStub(channel)
    question = "What is 12 plus 30?"
    whole = service.Chat(chat_request(stubs, question), timeout=60).candidates[0].message.content
    head = whole[: whole.rindex(" ")]
    request = chat_request(stubs, question, continue_final_message=True)
    request.messages.add(role=stubs.chat.ROLE_ASSISTANT, content=head)
    rest = service.Chat(request, timeout=60).candidates[0].message.content
    assert head + rest == whole


def test_scores_are_the_sums_of_prompt_logprobs_over_one_context(stubs, channel):
    service = stubs.generation_grpc.GenerationServiceStub(channel)
    context = "Count: " + "one two three four five six seven eight " * 30 + "is"
    words = [" nine", " a word", "、三十五", " one two three"]
    continuation = stubs.generation.ScoreRequest.Continuation
    request = stubs.generation.ScoreRequest(
        model="tiny", text=context, continuations=[continuation(text=word) for word in words]
    )
    answer = service.Score(request, timeout=60)
    tokenizer = stubs.model_grpc.TokenizationServiceStub(channel)

    def tokens(text):
        return list(tokenizer.Tokenize(stubs.model.TokenizeRequest(model="tiny", text=text), timeout=60).tokens.ids)

    n_context = len(tokens(context))
    whole = stubs.common.LogprobOptions(prompt=True)
    stop = stubs.common.StopCriteria(max_output_tokens=0)
    for word, score in zip(words, answer.scores):
        alone = service.Generate(
            stubs.generation.GenerateRequest(model="tiny", text=context + word, logprobs=whole, stop=stop), timeout=60
        )
        expected = alone.prompt_logprobs[n_context:]
        assert score.token_count == len(expected) > 0
        assert score.logprob == pytest.approx(sum(token.logprob for token in expected), abs=1e-4)
        assert score.is_greedy == all(token.rank == 1 for token in expected)
    # The context is computed once, up to the border of a block: every other continuation finds it in the cache.
    computed = answer.usage.prompt_tokens - answer.usage.cached_prompt_tokens
    n_tokens = sum(score.token_count for score in answer.scores)
    assert n_context > 200 and computed <= n_context + n_tokens + 16 * len(words), (n_context, n_tokens, answer.usage)


def test_a_model_that_must_call_a_function_does(stubs, channel):
    service = stubs.chat_grpc.ChatServiceStub(channel)
    schema = {"type": "object", "properties": {"city": {"enum": ["東京", "Paris"]}}, "required": ["city"]}
    tool = stubs.chat.Tool(name="weather", description="The weather of a city", parameters=json.dumps(schema))
    question = stubs.chat.ChatMessage(role=stubs.chat.ROLE_USER, content="What is the weather in Paris?")
    common = {
        "model": "caller",
        "messages": [question],
        "tools": [tool],
        "tool_choice": stubs.chat.ToolChoice(name="weather"),
        "sampling": stubs.common.SamplingParams(temperature=1, seed=2),
        "stop": stubs.common.StopCriteria(max_output_tokens=200),
    }
    candidate = service.Chat(stubs.chat.ChatRequest(**common), timeout=60).candidates[0]
    assert candidate.finish.reason == stubs.common.FINISH_REASON_TOOL_CALLS
    (call,) = candidate.message.tool_calls
    assert call.name == "weather" and json.loads(call.arguments)["city"] in ("東京", "Paris")
    events = service.StreamChat(stubs.chat.StreamChatRequest(chat=stubs.chat.ChatRequest(**common)), timeout=60)
    pieces = [event.tool_call_delta for event in events if event.WhichOneof("event") == "tool_call_delta"]
    assert pieces[0].id.startswith("call_") and pieces[0].name == "weather"
    assert "".join(piece.arguments for piece in pieces) == call.arguments
    # And the conversation goes on with what the function gave.
    gave = stubs.chat.ChatMessage(role=stubs.chat.ROLE_TOOL, tool_call_id=call.id, content="sunny")
    common |= {"messages": [question, candidate.message, gave], "tool_choice": None}
    common["stop"] = stubs.common.StopCriteria(max_output_tokens=8)
    more = service.Chat(stubs.chat.ChatRequest(**common), timeout=60)
    assert more.usage.prompt_tokens > 0
    with pytest.raises(grpc.RpcError) as error:
        service.Chat(chat_request(stubs, tools=[tool]), timeout=60)
    assert "template does not read tools" in error.value.details()
