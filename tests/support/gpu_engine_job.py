"""Run requests through a vLLM engine on the GPU; the result is the answers and the statistics.

A job has `engine` (arguments of LLM), `prompts` (lists of token ids), `max_tokens`, and `options` of FlashPrefill, null
for vLLM's default backend. Engines of one `start_lock` start one after the other.
"""

import fcntl
import json
import os
import sys

from tests.support.jobs import finish


def main():
    job = json.load(sys.stdin)
    if job["options"] is not None:
        import vllm_flashprefill

        vllm_flashprefill.register(**job["options"])

    from vllm import LLM, SamplingParams

    with open(job["start_lock"] or os.devnull, "w") as lock:
        if job["start_lock"]:
            fcntl.flock(lock, fcntl.LOCK_EX)
        llm = LLM(**job["engine"])
    params = SamplingParams(temperature=0, max_tokens=job["max_tokens"], logprobs=5, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in job["prompts"]], params, use_tqdm=False)
    answers = [
        {
            "tokens": list(output.outputs[0].token_ids),
            "logprobs": [{str(t): lp.logprob for t, lp in step.items()} for step in output.outputs[0].logprobs],
            "cached": output.num_cached_tokens,
        }
        for output in outputs
    ]
    counted = vars(vllm_flashprefill.stats()) if job["options"] is not None else None
    finish({"answers": answers, "stats": counted})


if __name__ == "__main__":
    main()
