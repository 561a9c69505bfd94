"""Packed checkpoints in transformers (`from_pretrained`, `save_pretrained`) and in peft (LoRA)."""
