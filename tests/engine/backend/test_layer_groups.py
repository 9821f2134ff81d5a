import dataclasses

import pytest
import torch

from tests.support.flash_attn_step import EXACT, SPARSE, Classes, Step, assert_dense, assert_not_planned
from tests.support.request import Request
from tests.support.vllm_side import counted, our_backend


@pytest.mark.skipif(
    not getattr(our_backend().get_builder_cls(), "supports_update_block_table", False),
    reason="every group of layers has its metadata built",
)
class TestGroupsOfLayers:
    """vLLM builds a step's metadata once for groups of layers that differ in their caches alone, and updates it."""

    REQUESTS = (Request(1, 400), Request(200), Request(600, seed=2), Request(300, 200, 100), Request(1, 30))

    def updated(self, classes, *groups):
        first = metadata = classes.build(groups[0])
        for group in groups[1:]:
            metadata = classes.builder.update_block_table(metadata, group.block_table, group.slot_mapping)
            yield group, metadata
        yield groups[0], first

    @pytest.mark.parametrize("requests", [REQUESTS, REQUESTS[:4], REQUESTS[2:4], REQUESTS[:2]])
    @pytest.mark.parametrize("config", [EXACT, SPARSE])
    def test_each_reads_its_own_pages(self, calls, requests, config):
        groups = [Step(list(requests), 16, 3, group=group) for group in range(3)]
        classes = Classes(config)
        with counted() as built:
            expected = [classes.run(group) for group in groups]
        with counted() as count:
            for group, metadata in self.updated(classes, *groups):
                out = classes.forward(group, metadata)
                assert torch.equal(out[: group.num_tokens], expected[group.group][: group.num_tokens])
        assert count.stats == built.stats
        assert count.stats.sparse_tokens == 3 * sum(r.query_len for r in requests if r.query_len >= 300)

    def test_the_dense_part_follows(self, calls):
        groups = [Step(list(self.REQUESTS), 16, 3, group=group) for group in range(2)]
        classes = Classes(EXACT)
        for group, metadata in self.updated(classes, *groups):
            dense_metadata = metadata.flashprefill.dense_metadata
            dense = [0, 1, 4]
            assert metadata.flashprefill.plan.dense.tolist() == dense
            assert metadata.flashprefill.block_table is group.block_table
            assert torch.equal(dense_metadata.block_table, group.block_table[dense])
            slots = group.slot_mapping.split([r.query_len for r in group.requests])
            assert torch.equal(dense_metadata.slot_mapping, torch.cat([slots[row] for row in dense]))

    def test_what_is_not_planned_stays_so(self, calls):
        groups = [Step(list(self.REQUESTS), 16, 3, group=group) for group in range(2)]
        classes = Classes(EXACT)
        metadata = classes.builder.build(0, groups[0].common(), fast_build=True)
        metadata = classes.builder.update_block_table(metadata, groups[1].block_table, groups[1].slot_mapping)
        assert_dense(groups[1], assert_not_planned(classes, groups[1], metadata, calls))

    def test_a_group_is_planned_whose_metadata_is_made_of_a_dense_one(self, calls):
        groups = [Step(list(self.REQUESTS), 16, 3, group=group) for group in range(2)]
        first, second = Classes(dataclasses.replace(SPARSE, num_dense_layers=2)), Classes(SPARSE)
        for _ in range(3):
            metadata = first.build(groups[0])
            with counted() as of_first:
                first.forward(groups[0], metadata)
            updated = first.builder.update_block_table(metadata, groups[1].block_table, groups[1].slot_mapping)
            with counted() as of_second:
                second.forward(groups[1], updated)
            assert of_first.stats.sparse_tokens == 0
            assert of_second.stats.sparse_tokens == sum(r.query_len for r in self.REQUESTS if r.query_len >= 300)
