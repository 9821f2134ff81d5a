"""A batch in vLLM: `python examples/vllm_offline.py MODEL TEXT...`, each TEXT a file."""

import sys
from pathlib import Path

import vllm_flashprefill

if __name__ == "__main__":
    vllm_flashprefill.register()
    from vllm import LLM, SamplingParams

    llm = LLM(sys.argv[1])
    for output in llm.generate([Path(name).read_text() for name in sys.argv[2:]], SamplingParams(max_tokens=32)):
        print(output.outputs[0].text)
    print(vllm_flashprefill.stats())
