"""Makes tiny_model.json: what Hugging Face transformers answers, greedily, to 50 prompts of 1 to 600 tokens.

    pip install transformers && python tests/golden/make.py

The file is checked in; dynserve's tests need neither transformers nor this script.
"""

import json
import sys
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
MODEL = ROOT / "dynserve" / "local" / "tiny_model"
ANSWER = 24

sys.path.insert(0, str(ROOT / "benchmarks" / "tiny_model"))


def main() -> None:
    from corpus import documents

    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    text = "\n".join(d.text or " ".join(m["content"] for m in d.messages) for d in islice(documents(seed=7), 4000))
    ids = tokenizer.encode(text).ids
    lengths = [1, 2, 3, 31, 32, 33, 63, 64, 65, 600, *(1 + (i * 97) % 600 for i in range(40))]
    model = AutoModelForCausalLM.from_pretrained(MODEL, torch_dtype=torch.float32).eval()
    cases, at = [], 0
    for length in lengths:
        prompt = ids[at : at + length]
        at += length
        with torch.no_grad():
            out = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, length),
                max_new_tokens=ANSWER,
                do_sample=False,
                eos_token_id=None,
            )
        cases.append({"prompt": prompt, "answer": out[0, length:].tolist()})
    (HERE / "tiny_model.json").write_text("\n".join(["[", ",\n".join(json.dumps(c) for c in cases), "]"]) + "\n")


if __name__ == "__main__":
    main()
