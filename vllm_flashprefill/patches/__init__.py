"""What each vLLM version needs: importing a `patch_loader_vllm_*` registers the backend for it."""
