"""Asks as FastChat's MT-Bench generator does, through the openai package of its time: two turns, prints both answers.

    python fastchat.py http://127.0.0.1:8000 QUESTION QUESTION
"""

import json
import sys

import openai


def main(url: str, *questions: str) -> None:
    openai.api_base, openai.api_key = f"{url}/v1", "EMPTY"
    messages = [{"role": "system", "content": "あなたは誠実で優秀な日本人のアシスタントです。"}]
    answers = []
    for question in questions:
        messages.append({"role": "user", "content": question})
        answer = openai.ChatCompletion.create(model="tiny", messages=messages, n=1, temperature=0.0, max_tokens=1024)
        answers.append(answer["choices"][0]["message"]["content"])
        messages.append({"role": "assistant", "content": answers[-1]})
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
