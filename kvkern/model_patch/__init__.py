"""kvkern inside Hugging Face models: store, cache, attention, mask. The only place that knows transformers."""
