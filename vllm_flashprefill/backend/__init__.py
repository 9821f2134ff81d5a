"""The attention backend. Nothing here depends on one vLLM version."""
