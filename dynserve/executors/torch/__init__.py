"""The PyTorch executor: small model code of its own, a paged KV cache, a step loop in its own thread."""
