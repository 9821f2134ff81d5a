"""The four stages on the CPU, by PyTorch's operators."""
