"""alpha above 0: chunks, mixed batches and needles."""

import pytest

from tests.support.engines import BARE, assert_same, engine, vllm_version

SPARSE = {"alpha": 0.3, "piece_size": 0, **BARE, "num_sink_blocks": 1, "num_dense_tail_blocks": 2}


def pruned(stats):
    return stats.visible_blocks - stats.kept_blocks


@pytest.fixture(scope="module")
def prompts(text_ids):
    return [(text_ids[a : a + n], 8) for a, n in ((0, 1300), (30_000, 600), (60_000, 90))]


@pytest.fixture(scope="module")
def alone(prompts):
    """[(answer, stats)] of each prompt in an engine step of its own."""
    with engine(SPARSE) as generate:
        results = [generate([prompt]) for prompt in prompts]
        together = generate(prompts)
    return [(answers[0], stats) for answers, stats in results], together


def test_the_cases_prune(alone):
    long, shorter, short = (stats for _, stats in alone[0])
    assert long.density < 0.9
    assert shorter.density < 1.0
    assert short.sparse_tokens == 0


def test_a_batch_in_one_step_equals_each_alone(alone):
    each, (answers, stats) = alone
    assert_same(answers, [answer for answer, _ in each])
    assert pruned(stats) == pytest.approx(sum(pruned(stats) for _, stats in each), rel=2e-3)


@pytest.fixture(scope="module")
def chunked(prompts):
    """(answers, stats) of the longest prompt in chunks, and of all three while one of them decodes."""
    decoding = (prompts[2][0], 12)
    with engine(SPARSE, max_num_batched_tokens=512, enable_chunked_prefill=True) as generate:
        return generate([prompts[0]]), generate([decoding, prompts[0], prompts[1]])


def test_aligned_chunks_select_what_one_pass_selects(chunked, alone):
    (answers, stats), _ = chunked
    whole, whole_stats = alone[0][0]
    assert_same(answers, [whole])
    # What has nothing to prune is not counted in a chunk of its own, so the pruned blocks are what must agree.
    # A block whose score is within rounding of the threshold may fall on either side.
    assert pruned(stats) == pytest.approx(pruned(whole_stats), rel=2e-3)


def test_a_mixed_batch_gives_each_what_it_gets_alone(chunked, alone):
    _, ((short, long, shorter), stats) = chunked
    each = [answer for answer, _ in alone[0]]
    assert short["tokens"][:8] == each[2]["tokens"]
    # Chunks that start in the middle of a block score it by fewer rows: the answers agree, not every block.
    assert long["tokens"] == each[0]["tokens"]
    assert shorter["tokens"] == each[1]["tokens"]
    assert stats.dense_tokens["decode"] >= 30 * 11


# Tokens of a prompt, and where in it the fact is; one near the model's limit of 8K.
PLACES = [*((4096, depth) for depth in (0.9, 0.7, 0.5, 0.3, 0.1)), (7500, 0.5)]


@pytest.mark.skipif(vllm_version() in ("0.10.0", "0.12.0"), reason="one version's needles are enough, the newest's")
def test_needles_are_found_wherever_dense_finds_them(text_ids, tokenizer, capfd):
    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False).ids

    # Said twice, it is a fact that this model can still find with dense attention near its limit of 8K tokens.
    name, code = "blue harbour", "7391"
    fact = f"\n\nThe secret code of the {name} is {code}. Remember it: the secret code of the {name} is {code}.\n\n"
    question = f"\n\nQuestion: What is the secret code of the {name}?\nAnswer: The secret code of the {name} is"
    fact, question = encode(fact), encode(question)

    def prompt(length, depth):
        room = length - len(fact) - len(question)
        return text_ids[: int(depth * room)] + fact + text_ids[int(depth * room) : room] + question

    def misses(places, options):
        """The places at which an engine misses the fact.

        Deepest first: each prompt reuses the text before its fact, and its density is of what it computes itself.
        """
        missed = []
        with engine(options, enable_prefix_caching=True, max_num_batched_tokens=8192) as generate:
            for length, depth in places:
                (answer,), stats = generate([(prompt(length, depth), 6)])
                found = code in answer["text"]
                density = "dense" if options is None else f"density {stats.density:.1%}"
                print(f"\n  {length} tokens, fact at {depth:.0%}: {density}, {'found' if found else 'missed'}", end="")
                assert options is None or stats.density < 0.9
                if not found:
                    missed.append((length, depth))
        print()
        return missed

    with capfd.disabled():
        # By pieces, not whole as this model's preset has it. The later prompts too are to be sparse, although some
        # layers keep more of them than pays.
        missed = misses(PLACES, {"piece_size": 8, "max_density": 1.0})
        assert set(missed) != set(PLACES), "where nothing is found, nothing is tested"
        if missed:
            assert misses(missed, None) == missed, "dense finds what sparse missed"
