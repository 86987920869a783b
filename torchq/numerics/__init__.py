"""Scale, zero point, quantized values, and how large their error is: float and integer arithmetic on plain tensors."""
