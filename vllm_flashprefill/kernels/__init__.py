"""Triton kernels of the four stages, each with its launcher; none imports vllm."""
