"""A KV connector between engines of one machine, through files.

vLLM's example of one, but for how it reads and writes a cache: it takes a cache's third dimension for the tokens of a
page, which in the CPU's are heads, and copies to a GPU. Whole pages are copied here, whatever is in them.
"""

import safetensors.torch
from vllm.distributed.kv_transfer.kv_connector.v1.shared_storage_connector import SharedStorageConnector


class PageConnector(SharedStorageConnector):
    def _pages(self, request):
        return request.slot_mapping[:: self._block_size] // self._block_size

    def _file(self, layer_name, request):
        return self._generate_filename_debug(layer_name, request.token_ids, request.mm_hashes)

    def start_load_kv(self, forward_context, **kwargs):
        for request in self._get_connector_metadata().requests:
            if request.is_store:
                continue
            for name, layer in forward_context.no_compile_layers.items():
                cache = layer.kv_cache[forward_context.virtual_engine]
                cache[:, self._pages(request)] = safetensors.torch.load_file(self._file(name, request))["pages"]

    def save_kv_layer(self, layer_name, kv_layer, attn_metadata, **kwargs):
        for request in self._get_connector_metadata().requests:
            if request.is_store:
                pages = kv_layer[:, self._pages(request)].contiguous()
                safetensors.torch.save_file({"pages": pages}, self._file(layer_name, request))
