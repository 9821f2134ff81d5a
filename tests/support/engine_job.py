"""Run prompts through a vLLM engine; the result is of each batch of each pass.

A job has `engine` (arguments of LLM), `batches` (lists of [prompt token ids, tokens to generate]), and `passes`: the
batches are run once for each, under options of FlashPrefill that the running engine is given. FlashPrefill comes in by
an import of the loader from the checkout.
"""

import json
import sys

from tests.support.jobs import finish


def load():
    from vllm_flashprefill.patches.versions import installed_vllm, loader_for

    exec(f"from patches import {loader_for(installed_vllm())}")


def answer(llm, batch):
    """Greedy answers as {"tokens", "text", "logprobs", "cached"}."""
    from vllm import SamplingParams

    params = [SamplingParams(temperature=0, max_tokens=n, logprobs=1, ignore_eos=True) for _, n in batch]
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt, _ in batch], params, use_tqdm=False)
    return [
        {
            "tokens": list(output.outputs[0].token_ids),
            "text": output.outputs[0].text,
            "logprobs": [
                step[token].logprob
                for token, step in zip(output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True)
            ],
            "cached": output.num_cached_tokens,
        }
        for output in outputs
    ]


def main():
    job = json.load(sys.stdin)
    load()

    from vllm import LLM

    from evaluation.engine import configure
    from vllm_flashprefill import stats

    llm = LLM(**job["engine"])
    results = []
    for options in job["passes"]:
        if options:
            assert all(llm.collective_rpc(configure, args=(options,)))
        for batch in job["batches"]:
            before = stats()
            answers = answer(llm, batch)
            results.append({"answers": answers, "stats": vars(stats() - before)})
    finish(results)


if __name__ == "__main__":
    main()
