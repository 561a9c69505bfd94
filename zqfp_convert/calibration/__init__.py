"""Statistics of activations: calibration tokens, and hidden states streamed block by block."""
