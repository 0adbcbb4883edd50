#!/usr/bin/env python3
"""Writes golden/hf.txt: logits of the tiny models of test_hf.py, computed by transformers in float32. A line
has the name of a model and the logits of one position. Needs torch and transformers; made with transformers
5.24.0, and 4.57.1 gives the same to 1e-5."""

import os
import tempfile

import test_hf
import torch
from transformers import AutoModelForCausalLM


def main():
    tokens = torch.tensor([test_hf.test_tokens()])
    with tempfile.TemporaryDirectory() as tmp, open(test_hf.GOLDEN, "w") as out:
        for name, family in test_hf.FAMILIES.items():
            folder = test_hf.make_folder(os.path.join(tmp, name), family)
            model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
            with torch.no_grad():
                logits = model(tokens).logits[0]
            for position in test_hf.GOLDEN_POSITIONS:
                print(name, *(f"{v:.6g}" for v in logits[position].tolist()), file=out)


if __name__ == "__main__":
    main()
