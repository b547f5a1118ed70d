"""Random texts and the ids that tiktoken, the tokenizer of Llama 3's own release, gives them; a JSON line each.

    python llama3_reference.py FOLDER SEED COUNT
"""

import json
import lzma
import pathlib
import random
import sys
import unicodedata

import tiktoken
from tiktoken.load import load_tiktoken_bpe

# Kinds of characters on which tokenizers differ: blocks of Unicode, ends included, and single pieces.
BLOCKS = [
    (0x20, 0x7E), (0xA0, 0x24F), (0x300, 0x36F), (0x370, 0x52F), (0x590, 0x6FF), (0x900, 0xDFF), (0xE00, 0xE7F),
    (0x2000, 0x206F), (0x2100, 0x218F), (0x2460, 0x24FF), (0x3000, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3),
    (0xF900, 0xFAFF), (0xFF00, 0xFFEF), (0x10000, 0x1FFFF), (0x20000, 0x2FA1F), (0x1F300, 0x1FAFF),
]
PIECES = [
    " ", "  ", "\n", "\r\n", "\t", "\u3000", "\u00a0", "'s", "'RE", "’s", "'", "123", "4567", "７８", "Ⅷ", "½", "the", "Hello",
    "です", "ました。", "東京", "👨‍👩‍👧‍👦", "🇯🇵", "e\u0301", "\u200d", "\ufeff", "\x00", "\x1b", "<|eot", "ｶﾞ", "...", "!!!\n\n", "==",
]


def text(rng: random.Random) -> str:
    parts = []
    for _ in range(rng.randrange(1, 24)):
        if rng.random() < 0.5:
            parts.append(rng.choice(PIECES))
        else:
            low, high = rng.choice(BLOCKS)
            some = (chr(rng.randint(low, high)) for _ in range(rng.randrange(1, 6)))
            # What is not assigned yet depends on the version of Unicode that a regular expression knows.
            parts.append("".join(c for c in some if unicodedata.category(c) not in ("Cn", "Co", "Cs")))
    return "".join(parts)


def main(folder: str, seed: str, count: str) -> None:
    files = pathlib.Path(folder)
    with lzma.open(files / "llama3_tokenizer.json.xz") as packed:
        split = json.load(packed)["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    ranks = load_tiktoken_bpe(str(files / "llama3_tokenizer.model"))
    reference = tiktoken.Encoding("llama3", pat_str=split, mergeable_ranks=ranks, special_tokens={})
    rng = random.Random(int(seed))
    for _ in range(int(count)):
        one = text(rng)
        json.dump([one, reference.encode_ordinary(one)], sys.stdout)
        sys.stdout.write("\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
