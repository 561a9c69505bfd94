"""Runs packed checkpoints: the quantized linear layer, its ways to multiply, the loader."""
