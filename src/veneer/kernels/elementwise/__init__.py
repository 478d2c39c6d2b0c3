"""Norms, gated activations and rotary embeddings in one pass over memory."""
