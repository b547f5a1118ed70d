"""Runs the evaluation tasks against a server, through lm-eval's own API models; prints JSON in the form of reference.json.

    python evaluate.py http://127.0.0.1:8000
"""

import json
import sys

import harness

TINY = str(harness.HERE.parents[1] / "fixtures" / "tiny")


def runs(url: str) -> dict:
    completions = {
        "model": "tiny",
        "base_url": f"{url}/v1/completions",
        "tokenizer_backend": "huggingface",
        "tokenizer": TINY,
        "max_length": 8192,
        "num_concurrent": 4,
        "max_retries": 1,
    }
    # A template writes its own BOS; plain text has none yet.
    plain = completions | {"add_bos_token": True}
    text = plain | {"tokenized_requests": False}
    chat = {"model": "tiny", "base_url": f"{url}/v1/chat/completions", "num_concurrent": 4, "max_retries": 1}
    return {
        # The client renders the template and sends token ids.
        "chat": harness.results("local-completions", completions, harness.TASKS, chat=True),
        "plain": harness.results("local-completions", plain, harness.PLAIN, chat=False),
        # The server tokenises, and puts the one BOS.
        "text": harness.results("local-completions", text, harness.PLAIN, chat=False),
        # The server renders the template.
        "messages": harness.results("local-chat-completions", chat, harness.GENERATION, chat=True, batch_size=1),
    }


if __name__ == "__main__":
    stdout, sys.stdout = sys.stdout, sys.stderr  # lm-eval prints; the result stands alone.
    json.dump(runs(sys.argv[1]), stdout)
