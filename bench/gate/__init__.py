"""The compile gate: kernels compiled for GPUs that are not here keep their figures and the contract's allow-list."""
