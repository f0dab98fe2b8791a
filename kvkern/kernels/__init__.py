"""The C door, and later the Triton kernels. Knows tensors; knows neither the store nor transformers."""
