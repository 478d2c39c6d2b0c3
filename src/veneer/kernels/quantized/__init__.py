"""Frozen weights in formats of fewer bits: NF4 and FP4 (with double quantization) and int8, as bitsandbytes stores them."""
