"""Generation in Hugging Face transformers: `python examples/transformers_generate.py MODEL < TEXT`."""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_flashprefill import hf

hf.register()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], attn_implementation="flashprefill")
prompt = tokenizer(sys.stdin.read(), return_tensors="pt", return_token_type_ids=False)
answer = model.generate(**prompt, max_new_tokens=32)[0, prompt["input_ids"].shape[1] :]
print(tokenizer.decode(answer), hf.stats(), sep="\n")
