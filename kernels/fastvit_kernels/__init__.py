"""Triton kernels of a Vision Transformer, forward and backward; one file per op."""
