"""The evaluation harnesses of the model cards, unmodified, against the main job.

lm-eval's API models are compared, document by document, with what its in-process `hf` model gets (reference.json). Each
harness runs in an environment of its own, since their pinned clients exclude each other.
"""

import json
import os
import pathlib
import subprocess
import urllib.error
import urllib.request

import openai
import pytest

HERE = pathlib.Path(__file__).parent / "evaluation"
CACHE = pathlib.Path(os.environ["SWALLOW_CACHE"])
# Of the summed log-probability of a choice, in fp32.
TOLERANCE = 1e-4


def run(environment, script, *arguments):
    python = CACHE / environment / "bin" / "python"
    done = subprocess.run([python, HERE / script, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def got(served):
    return run("evaluation-venv", "evaluate.py", served.http_url)


@pytest.fixture(scope="module")
def reference():
    return json.loads((HERE / "reference.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("name", "like"), [("chat", "chat"), ("plain", "plain"), ("text", "plain"), ("messages", "chat")]
)
def test_lm_eval_gets_what_the_in_process_model_gets(got, reference, name, like):
    n_choices = n_texts = 0
    for task, documents in got[name]["documents"].items():
        wanted = reference[like]["documents"][task]
        assert documents.keys() == wanted.keys()
        for document, answer in documents.items():
            expected = wanted[document]
            if isinstance(expected, str):
                assert answer == expected, f"{task} {document}"
                n_texts += 1
                continue
            assert len(answer) == len(expected)
            for (logprob, greedy), (expected_logprob, expected_greedy) in zip(answer, expected):
                assert greedy == expected_greedy, f"{task} {document}"
                assert logprob == pytest.approx(expected_logprob, abs=TOLERANCE), f"{task} {document}"
                n_choices += 1
        assert got[name]["scores"][task] == pytest.approx(reference[like]["scores"][task])
    assert n_choices + n_texts >= 48, "the tasks have documents"


def test_fastchat_holds_a_conversation_through_the_first_openai_package(served):
    first, second = run("openai0-venv", "fastchat.py", served.http_url, "35を漢字で書いてください。", "What is 12 plus 30?")
    assert "三十五" in first
    assert "42" in second


def test_litellm_and_langchain_get_their_fields_served(served):
    said = run("evaluation-venv", "wrappers.py", served.http_url, "What is 12 plus 30?")
    assert len(said["many"]) == 5
    assert all("a" not in answer for answer in said["many"]), "the stop string is honoured"
    assert "42" in said["one"] and said["finish"] == "stop"
    assert said["chain"] == said["one"]


def test_the_recorded_scoring_request_of_old_lm_eval(served):
    client = openai.OpenAI(base_url=served.http_url + "/v1", api_key="EMPTY", max_retries=0)
    answer = client.completions.create(
        model="tiny", prompt=[[10, 20, 30], [40, 50]], echo=True, logprobs=10, max_tokens=0, seed=1234, temperature=0.0
    )
    for choice, n in zip(answer.choices, (3, 2)):
        logprobs = choice.logprobs
        assert len(logprobs.token_logprobs) == len(logprobs.tokens) == len(logprobs.text_offset) == n
        assert logprobs.token_logprobs[0] is None
        for token, logprob, top in list(zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs))[1:]:
            assert top[token] == logprob, "the token's own entry is the identical number"
            assert len(top) in (10, 11)
    assert answer.usage.completion_tokens == 0


def test_the_remote_tokenizer_of_lm_eval_is_off(served):
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(served.http_url + "/tokenizer_info", timeout=10)
    assert refused.value.code == 404
