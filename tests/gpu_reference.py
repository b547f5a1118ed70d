"""What transformers computes, for checks of the CUDA device: `gpu_reference.py OUT MODEL=FOLDER...`.

Writes OUT/MODEL.json: for each golden prompt, the log-probabilities in bf16 of its tokens but the first and of its
outputs. And OUT/large, a model with the sizes of Llama 3 8B in fewer layers, whose attention looks at few positions, with
OUT/large.json: texts of random tokens, some beyond 8,192 positions, and their log-probabilities in fp32 and in bf16.
"""

import json
import math
import pathlib
import sys

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

GOLDENS = pathlib.Path(__file__).parent / "fixtures" / "goldens"
LENGTHS = [20, 333, 2048, 9500]
# Standard deviation of attention's scores is the square of this.
SHARPNESS = 2.0


def logprobs(model, ids):
    """Of every token but the first. Logits come in pieces: those of a long text fill a GPU."""
    tokens = torch.tensor([ids], device="cuda")
    lists = []
    with torch.inference_mode():
        hidden = model.model(tokens).last_hidden_state[0, :-1]
        for rows, chosen in zip(hidden.split(1024), tokens[0, 1:].split(1024)):
            scores = model.lm_head(rows).float().log_softmax(-1)
            lists += scores.gather(1, chosen[:, None])[:, 0].tolist()
    return lists


LARGE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def large():
    config = LlamaConfig(**LARGE)
    torch.manual_seed(1)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cuda").eval()
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config, device="cuda")
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            weight.data.fill_(1.0)
            continue
        gain = SHARPNESS if "q_proj" in name or "k_proj" in name else 1.0
        spread = 1.0 if "embed" in name else gain / math.sqrt(weight.shape[1])
        weight.data.normal_(std=spread)
    return model


def write_large(out):
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    model = large()
    model.save_pretrained(out / "large")
    # As published models have it: newer versions of transformers write other names.
    published = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", **LARGE}
    (out / "large" / "config.json").write_text(json.dumps(published))
    generator = torch.Generator().manual_seed(2)
    texts = [torch.randint(model.config.vocab_size, (n,), generator=generator).tolist() for n in LENGTHS]
    bf16 = [logprobs(model, ids) for ids in texts]
    rotary = model.model.rotary_emb
    model = model.float()  # the same numbers
    assert rotary.inv_freq.dtype == torch.float32
    fp32 = [logprobs(model, ids) for ids in texts]
    (out / "large.json").write_text(json.dumps({"texts": texts, "bf16": bf16, "fp32": fp32}))


def main():
    out = pathlib.Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    for argument in sys.argv[2:]:
        name, folder = argument.split("=", 1)
        goldens = json.loads((GOLDENS / f"{name}.json").read_text())
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).cuda().eval()
        lists = [logprobs(model, p["prompt_ids"] + p["output_ids"]) for p in goldens["prompts"]]
        (out / f"{name}.json").write_text(json.dumps(lists))
    write_large(out)


main()
