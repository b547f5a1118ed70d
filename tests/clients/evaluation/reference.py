"""Writes reference.json: what lm-eval's in-process `hf` model gets for every document, in fp32 on the CPU.

    python3 -m venv /tmp/reference && /tmp/reference/bin/pip install 'lm_eval[hf]==0.4.13'
    /tmp/reference/bin/python tests/clients/evaluation/reference.py

Tests only read the file; they need no torch.
"""

import json
from pathlib import Path

import harness

TINY = harness.HERE.parents[1] / "fixtures" / "tiny"


def main() -> None:
    model = {"pretrained": str(TINY), "dtype": "float32", "device": "cpu", "max_length": 8192}
    runs = {
        "chat": harness.results("hf", model, harness.TASKS, chat=True),
        "plain": harness.results("hf", model | {"add_bos_token": True}, harness.PLAIN, chat=False),
    }
    path = Path(harness.HERE / "reference.json")
    path.write_text(json.dumps(runs, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    for name, run in runs.items():
        print(name, run["scores"])


if __name__ == "__main__":
    main()
