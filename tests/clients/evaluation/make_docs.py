"""Writes the documents of the evaluation tasks from the held-out questions of the tiny model. Standard library only.

    python3 tests/clients/evaluation/make_docs.py

A multiple-choice document takes its wrong choices from the answers of other questions of the same task and language,
so that every choice is a sound answer to something.
"""

import json
from pathlib import Path
from random import Random

HERE = Path(__file__).parent
HELD_OUT = HERE.parents[1] / "fixtures" / "heldout.json"
N_DOCS = 24
N_CHOICES = 4


def questions(tasks: tuple[str, ...]) -> list[dict]:
    """Held-out questions of one turn of these tasks, both languages in turn."""
    tests = json.loads(HELD_OUT.read_text(encoding="utf-8"))
    alone = [test for test in tests if test["task"] in tasks and len(test["messages"]) == 1]
    by_language = [[test for test in alone if test["lang"] == lang] for lang in ("ja", "en")]
    return [test for pair in zip(*by_language) for test in pair]


def multiple_choice(tasks: tuple[str, ...], rng: Random) -> list[dict]:
    """Documents with the right answer at a random place among wrong ones."""
    tests = questions(tasks)
    documents = []
    for test in tests[:N_DOCS]:
        same = {(other["answer"]) for other in tests if (other["task"], other["lang"]) == (test["task"], test["lang"])}
        wrong = rng.sample(sorted(same - {test["answer"]}), N_CHOICES - 1)
        choices = [*wrong, test["answer"]]
        rng.shuffle(choices)
        documents.append(
            {
                "question": test["messages"][0]["content"],
                "choices": choices,
                "answer": choices.index(test["answer"]),
            }
        )
    return documents


def generation(tasks: tuple[str, ...]) -> list[dict]:
    """Documents whose answer is a text."""
    return [
        {"question": test["messages"][0]["content"], "answer": test["answer"]} for test in questions(tasks)[:N_DOCS]
    ]


def write(name: str, documents: list[dict]) -> None:
    assert len(documents) == N_DOCS, f"{name}: {len(documents)} documents"
    lines = [json.dumps(document, ensure_ascii=False) + "\n" for document in documents]
    (HERE / "docs" / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def main() -> None:
    rng = Random("evaluation documents")
    write("numerals", multiple_choice(("numeral",), rng))
    write("words", multiple_choice(("word",), rng))
    write("sums", generation(("sum", "json-sum")))
    write("dates", generation(("date", "weekday-date")))


if __name__ == "__main__":
    main()
