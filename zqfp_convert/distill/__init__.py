"""End-to-end tuning of a quantized model against the token distributions of its original."""
