"""Measures a packed model at work: tokens a second, memory, bytes read; beside its original."""
