"""Scales, zero points, quantized values and their errors: arithmetic on plain tensors."""
