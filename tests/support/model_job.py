"""Run one batch of prompts through a vLLM engine; the result is the answers and the statistics.

A job has `engine` (arguments of LLM), `prompts` (token ids), `new_tokens`, and `images`: to a prompt's number, the
side of an image of noise that goes with it. A pooling engine answers with embeddings.
"""

import json
import sys
import time

from tests.support.jobs import finish


def inputs(job):
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    for number, side in job.get("images", {}).items():
        import numpy as np
        from PIL import Image

        noise = np.random.default_rng(side).integers(0, 256, (side, side, 3), dtype=np.uint8)
        prompts[int(number)]["multi_modal_data"] = {"image": Image.fromarray(noise)}
    return prompts


def answer(llm, job):
    if job["engine"].get("runner") == "pooling":
        outputs = llm.embed(inputs(job), use_tqdm=False)
        return [
            {"prompt_tokens": len(output.prompt_token_ids), "embedding": output.outputs.embedding} for output in outputs
        ]

    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0, max_tokens=job["new_tokens"], ignore_eos=True, logprobs=2, prompt_logprobs=0, detokenize=False
    )
    return [
        {
            # More than were given where there is an image.
            "prompt_tokens": len(output.prompt_token_ids),
            "prompt": [
                step[token].logprob
                for token, step in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
            ],
            "tokens": list(output.outputs[0].token_ids),
            "steps": [
                sorted(([token, x.logprob] for token, x in step.items()), key=lambda pair: -pair[1])
                for step in output.outputs[0].logprobs
            ],
        }
        for output in llm.generate(inputs(job), params, use_tqdm=False)
    ]


def main():
    job = json.load(sys.stdin)
    from vllm import LLM

    from vllm_flashprefill import stats

    llm = LLM(**job["engine"])
    before = stats()
    answers = answer(llm, job)
    # Densities arrive behind the GPU's work.
    time.sleep(0.5)
    finish({"answers": answers, "stats": vars(stats() - before)})


if __name__ == "__main__":
    main()
