"""Fused scoring: each kernel a plain-torch definition, a Triton version, a test that holds them together, a benchmark.

Knows no head, no batch and no engine: tensors in, tensors out. Triton is imported only where it runs.
"""
