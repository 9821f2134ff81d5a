"""What scripts/fetch_model.py makes of a GGUF file, without one."""

from scripts import fetch_model


def test_gemma_tensors_have_the_names_of_transformers():
    assert fetch_model.gemma_name("token_embd.weight") == "model.embed_tokens.weight"
    assert fetch_model.gemma_name("blk.7.attn_norm.weight") == "model.layers.7.input_layernorm.weight"
    assert fetch_model.gemma_name("blk.0.post_ffw_norm.weight") == "model.layers.0.post_feedforward_layernorm.weight"


def test_merges_come_in_the_order_of_the_scores_of_what_they_give():
    tokens = ["a", "b", "c", "ab", "bc", "abc", "aa"]
    scores = [0, 0, 0, -2, -1, -3, 0]
    merges = fetch_model.gemma_merges(tokens, scores)
    assert merges == [("a", "a"), ("b", "c"), ("a", "b"), ("a", "bc"), ("ab", "c")]
