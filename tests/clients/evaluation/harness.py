"""Runs lm-eval on our tasks, and reads from its samples what a document got: the same for every model."""

import os
from pathlib import Path

HERE = Path(__file__).parent
TASKS = ["swallow_numerals", "swallow_words", "swallow_sums", "swallow_dates"]
GENERATION = ["swallow_sums", "swallow_dates"]
# Text as it is, without the chat format: the client sends strings or bare token ids.
PLAIN = ["swallow_numerals", "swallow_dates"]


def results(model: str, model_args: dict, tasks: list[str], chat: bool, batch_size: int = 8) -> dict:
    """Task -> document -> what it got: [[logprob, is_greedy], ...] by choice, or the generated text.

    Scores are in `scores`, by task and metric.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    import lm_eval
    from lm_eval.tasks import TaskManager

    os.chdir(HERE)  # The tasks name their documents relative to it.
    out = lm_eval.simple_evaluate(
        model=model,
        model_args=model_args,
        tasks=tasks,
        task_manager=TaskManager(include_path=str(HERE / "tasks"), include_defaults=False),
        apply_chat_template=chat,
        batch_size=batch_size,
        log_samples=True,
        bootstrap_iters=0,
    )
    got = {task: {str(sample["doc_id"]): answer(sample) for sample in out["samples"][task]} for task in tasks}
    scores = {
        task: {
            metric.split(",")[0]: value
            for metric, value in out["results"][task].items()
            if isinstance(value, float) and "stderr" not in metric
        }
        for task in tasks
    }
    return {"documents": got, "scores": scores}


def answer(sample: dict):
    """What lm-eval keeps of a document's requests, whatever their kind."""
    responses = [response[0] for response in sample["resps"]]
    if isinstance(responses[0], str):
        return responses[0]
    return [[float(logprob), str(greedy) == "True"] for logprob, greedy in responses]
