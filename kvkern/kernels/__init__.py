"""The Triton kernels and the doors to the C reference. Knows tensors; knows neither the store nor transformers."""
