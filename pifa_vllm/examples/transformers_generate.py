"""Generate with transformers: `python transformers_generate.py CHECKPOINT [PROMPT]`."""

import sys

from transformers import AutoTokenizer

import pifa_vllm

checkpoint = sys.argv[1]
prompt = sys.argv[2] if len(sys.argv) > 2 else "Low-rank matrices are"

model = pifa_vllm.load(checkpoint)
tokenizer = AutoTokenizer.from_pretrained(checkpoint)
tokens = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=32, do_sample=False)
print(tokenizer.decode(tokens[0], skip_special_tokens=True))
