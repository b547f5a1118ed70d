"""What transformers computes in bf16 on the goldens' sequences: `gpu_reference.py OUT MODEL=FOLDER...`.

Writes OUT/MODEL.json: for each golden prompt, the log-probabilities of its tokens but the first and of its outputs.
"""

import json
import pathlib
import sys

import torch
from transformers import AutoModelForCausalLM

GOLDENS = pathlib.Path(__file__).parent / "fixtures" / "goldens"


def logprobs(model, ids):
    with torch.inference_mode():
        logits = model(torch.tensor([ids], device="cuda")).logits[0, :-1].float()
    chosen = torch.tensor(ids[1:], device="cuda")[:, None]
    return logits.log_softmax(-1).gather(1, chosen)[:, 0].tolist()


def main():
    out = pathlib.Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    for argument in sys.argv[2:]:
        name, folder = argument.split("=", 1)
        goldens = json.loads((GOLDENS / f"{name}.json").read_text())
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).cuda().eval()
        lists = [logprobs(model, p["prompt_ids"] + p["output_ids"]) for p in goldens["prompts"]]
        (out / f"{name}.json").write_text(json.dumps(lists))


main()
