"""The openai package against the main job: chat and completions, streamed and not, and the errors it raises."""

import asyncio
import json
import pathlib
import re
import time

import openai
import pytest
from openai.types import completion_create_params as completion_params
from openai.types.chat import completion_create_params as chat_params

API = pathlib.Path(__file__).resolve().parents[2] / "router" / "API.md"

JAPANESE = "35を漢字で書いてください。"
ENGLISH = "What is 12 plus 30?"


@pytest.fixture(scope="module")
def client(served):
    return openai.OpenAI(base_url=served.http_url + "/v1", api_key="any", max_retries=0, timeout=60)


def ask(client, question, **more):
    messages = [{"role": "user", "content": question}]
    return client.chat.completions.create(model="tiny", messages=messages, temperature=0, **more)


def test_a_chat_answer_streams_to_the_same_text(client):
    for question in (JAPANESE, ENGLISH):
        whole = ask(client, question)
        assert whole.choices[0].finish_reason == "stop"
        assert whole.choices[0].message.content.strip()
        deltas, usage = [], None
        for chunk in ask(client, question, stream=True, stream_options={"include_usage": True}):
            usage = chunk.usage or usage
            deltas += [choice.delta.content or "" for choice in chunk.choices]
        assert "".join(deltas) == whole.choices[0].message.content
        assert "\ufffd" not in "".join(deltas)
        assert usage.completion_tokens == whole.usage.completion_tokens
        assert usage.prompt_tokens == whole.usage.prompt_tokens


def test_the_trained_model_knows_its_tasks(client):
    assert "三十五" in ask(client, JAPANESE).choices[0].message.content
    assert "42" in ask(client, ENGLISH).choices[0].message.content


def test_many_at_once_get_what_one_alone_gets(served):
    questions = [f"What is {a} plus {b}?" for a in range(3, 11) for b in (7, 21)]

    async def run():
        async with openai.AsyncOpenAI(base_url=served.http_url + "/v1", api_key="any", max_retries=0) as client:

            async def one(question):
                answer = await ask(client, question)
                return answer.choices[0].message.content

            together = await asyncio.gather(*(one(question) for question in questions))
            alone = [await one(question) for question in questions]
            return together, alone

    together, alone = asyncio.run(run())
    assert together == alone


def test_seeded_sampling_repeats_and_n_differ(client):
    def draw():
        return client.completions.create(model="tiny", prompt="春", temperature=2, n=4, seed=7, max_tokens=12)

    first, again = draw(), draw()
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in again.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2, 3]
    assert len(set(texts)) > 1


def test_completion_logprobs_with_echo_cover_prompt_and_output(client):
    answer = client.completions.create(model="tiny", prompt="日本語 and English", echo=True, logprobs=3, max_tokens=4, temperature=0)
    logprobs = answer.choices[0].logprobs
    assert len(logprobs.tokens) == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])
    for token, value, top in zip(logprobs.tokens[1:], logprobs.token_logprobs[1:], logprobs.top_logprobs[1:]):
        assert top[token] == value


def test_chat_logprobs_carry_exact_bytes(client):
    answer = ask(client, JAPANESE, logprobs=True, top_logprobs=2)
    content = answer.choices[0].logprobs.content
    data = b"".join(bytes(token.bytes) for token in content)
    assert data.decode().startswith(answer.choices[0].message.content)


def test_token_ids_are_taken_as_they_are(client, served):
    import urllib.request

    def post(path, body):
        request = urllib.request.Request(served.http_url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        return json.load(urllib.request.urlopen(request))

    ids = post("/tokenize", {"model": "tiny", "prompt": "東京"})["tokens"]
    assert post("/detokenize", {"model": "tiny", "tokens": ids})["prompt"].endswith("東京")
    by_text = client.completions.create(model="tiny", prompt="東京", max_tokens=8, temperature=0)
    by_ids = client.completions.create(model="tiny", prompt=ids, max_tokens=8, temperature=0)
    assert by_text.choices[0].text == by_ids.choices[0].text
    assert by_text.usage.prompt_tokens == len(ids) == by_ids.usage.prompt_tokens


def test_models_and_aliases(client):
    names = {model.id for model in client.models.list()}
    assert {"tiny", "swallow-tiny", "odd"} <= names
    messages = [{"role": "user", "content": ENGLISH}]
    by_alias = client.chat.completions.create(model="swallow-tiny", messages=messages, temperature=0)
    assert by_alias.choices[0].message.content == ask(client, ENGLISH).choices[0].message.content


def test_mistakes_are_answered_with_what_to_change(client):
    with pytest.raises(openai.NotFoundError, match="nobody"):
        client.completions.create(model="nobody", prompt="a")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="tiny", prompt="a", temperature=9)
    with pytest.raises(openai.BadRequestError, match="tools"):
        ask(client, ENGLISH, tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}])
    with pytest.raises(openai.BadRequestError, match="8192"):
        client.completions.create(model="tiny", prompt=[5] * 9000)


def test_unknown_fields_are_named_in_a_header(client):
    raw = client.completions.with_raw_response.create(model="tiny", prompt="a", max_tokens=1, extra_body={"colour": "red"})
    assert raw.headers["x-swallow-ignored-fields"] == "colour"
    assert raw.headers["x-request-id"]


def test_token_ids_and_the_prompt_s_scores_come_with_a_stream(client):
    extra = {"return_token_ids": True, "prompt_logprobs": 1}
    common = {"model": "tiny", "prompt": "東京", "max_tokens": 5, "temperature": 0, "extra_body": extra}
    whole = client.completions.create(**common).choices[0]
    chunks = [chunk.choices[0] for chunk in client.completions.create(stream=True, **common)]
    assert chunks[0].prompt_token_ids == whole.prompt_token_ids
    assert chunks[0].prompt_logprobs == whole.prompt_logprobs and whole.prompt_logprobs[0] is None
    assert sum((getattr(chunk, "token_ids", []) for chunk in chunks), []) == whole.token_ids
    again = client.completions.create(
        model="tiny", prompt=whole.prompt_token_ids, max_tokens=5, temperature=0, extra_body=extra
    )
    assert again.choices[0].token_ids == whole.token_ids


def test_usage_is_told_while_a_stream_runs(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    counts = [chunk.usage.completion_tokens for chunk in ask(client, ENGLISH, stream=True, stream_options=options)]
    assert counts == sorted(counts) and counts[0] < counts[-1]


def test_a_message_is_continued_where_it_ends(client):
    whole = ask(client, ENGLISH).choices[0].message.content
    head, tail = whole[: len(whole) // 2].rstrip(), whole[len(whole[: len(whole) // 2].rstrip()) :]
    messages = [{"role": "user", "content": ENGLISH}, {"role": "assistant", "content": head}]
    extra = {"continue_final_message": True, "add_generation_prompt": False}
    rest = client.chat.completions.create(model="tiny", messages=messages, temperature=0, extra_body=extra)
    assert rest.choices[0].message.content == tail


@pytest.mark.parametrize(
    ("page", "params"), [("/v1/chat/completions", chat_params), ("/v1/completions", completion_params)]
)
def test_every_field_of_the_package_is_served_refused_or_without_effect(page, params):
    fields = set(params.CompletionCreateParamsBase.__annotations__) | {"stream"}
    section = API.read_text().split(f"## {page}\n")[1].split("\n## ")[0]
    documented = set(re.findall(r"^\| `(\w+)`", section, re.MULTILINE))
    assert fields <= documented, fields - documented


PERSON = {
    "type": "object",
    "properties": {"name": {"enum": ["燕", "llama"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def is_person(text):
    person = json.loads(text)
    return list(person) == ["name", "age"] and person["name"] in ("燕", "llama") and 0 <= person["age"] <= 99


@pytest.mark.parametrize("temperature", [0, 1])
def test_an_answer_follows_its_schema(client, temperature):
    schema = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": PERSON}}
    messages = [{"role": "user", "content": ENGLISH}]
    common = {"model": "tiny", "messages": messages, "response_format": schema, "temperature": temperature, "seed": 5}
    answer = client.chat.completions.create(n=3, max_tokens=200, **common)
    for choice in answer.choices:
        assert choice.finish_reason == "stop", choice.message.content
        assert is_person(choice.message.content)
    stream = client.chat.completions.create(stream=True, max_tokens=200, **common)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == answer.choices[0].message.content


def test_regular_expressions_choices_and_grammars_bind_completions(client):
    def complete(**extra):
        answer = client.completions.create(
            model="tiny", prompt="1 + 1 =", temperature=1, seed=3, max_tokens=40, n=4, extra_body=extra
        )
        return [choice.text for choice in answer.choices]

    form = {"type": "regex", "regex": "[0-9]{2}(年|月)"}
    assert all(re.fullmatch(form["regex"], text) for text in complete(response_format=form))
    assert set(complete(structured_outputs={"choice": ["夏休み", "winter"]})) <= {"夏休み", "winter"}
    grammar = 'start: WORD ("," WORD)~1..2\nWORD: /[a-c]+/'
    assert all(re.fullmatch("[a-c]+(,[a-c]+){1,2}", text) for text in complete(guided_grammar=grammar) if "," in text)


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ({"type": "regex", "regex": "a(?=b)"}, "look-around"),
        ({"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "nothing"}}}, "nothing"),
        ({"type": "regex", "regex": "(((((([a-z]{1,30}b?){1,30}b?){1,30}b?){1,30}b?){1,30}b?){1,30}b?)"}, "too"),
        ({"type": "grammar", "grammar": "start: missing"}, "missing"),
        ({"type": "xml"}, "xml"),
    ],
)
def test_what_cannot_be_compiled_is_a_bad_request(client, form, words):
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match=words):
            ask(client, ENGLISH, response_format=form, stream=stream)


def function(name, **properties):
    parameters = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": "It helps.", "parameters": parameters}}


TOOLS = [
    function("add", a={"type": "integer", "maximum": 99}, b={"$ref": "#/$defs/n"}),
    function("weather", city={"enum": ["東京", "Paris"]}),
]
TOOLS[0]["function"]["parameters"]["$defs"] = {"n": {"type": "integer", "minimum": 0, "maximum": 99}}


def check_call(call):
    arguments = json.loads(call.function.arguments)
    if call.function.name == "add":
        assert set(arguments) == {"a", "b"} and all(isinstance(n, int) for n in arguments.values())
    else:
        assert call.function.name == "weather" and arguments["city"] in ("東京", "Paris")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_model_that_must_call_a_function_does(client, choice):
    messages = [{"role": "user", "content": ENGLISH}]
    common = {"model": "caller", "messages": messages, "tools": TOOLS, "tool_choice": choice, "temperature": 1, "seed": 2}
    answer = client.chat.completions.create(n=3, max_tokens=300, **common)
    for candidate in answer.choices:
        assert candidate.finish_reason == "tool_calls" and candidate.message.content is None, candidate
        (call,) = candidate.message.tool_calls
        check_call(call)
        assert choice == "required" or call.function.name == "weather"
    pieces = [
        chunk.choices[0].delta.tool_calls[0]
        for chunk in client.chat.completions.create(stream=True, max_tokens=300, **common)
        if chunk.choices[0].delta.tool_calls
    ]
    first = answer.choices[0].message.tool_calls[0].function
    assert (pieces[0].id or "").startswith("call_") and pieces[0].function.name == first.name
    assert "".join(piece.function.arguments for piece in pieces) == first.arguments
    # And the conversation goes on with what the function gave.
    messages += [answer.choices[0].message, {"role": "tool", "tool_call_id": "c", "content": "42"}]
    more = client.chat.completions.create(model="caller", messages=messages, tools=TOOLS, temperature=0, max_tokens=20)
    assert more.usage.prompt_tokens > answer.usage.prompt_tokens


def test_a_model_that_may_call_a_function_answers_as_it_likes(client):
    free = ask(client, ENGLISH)
    messages = [{"role": "user", "content": ENGLISH}]
    hidden = client.chat.completions.create(
        model="caller", messages=messages, tools=TOOLS, tool_choice="none", temperature=0
    )
    assert hidden.choices[0].message.content == free.choices[0].message.content
    with pytest.raises(openai.BadRequestError, match="template does not read tools"):
        ask(client, ENGLISH, tools=TOOLS)


def test_a_deadline_in_a_header_binds_a_stream(client):
    start = time.monotonic()
    with pytest.raises(openai.APIError, match="deadline"):
        for _ in client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": ENGLISH}],
            max_tokens=8000,
            stream=True,
            extra_body={"ignore_eos": True},
            extra_headers={"x-request-timeout-ms": "700"},
        ):
            pass
    assert time.monotonic() - start < 5
