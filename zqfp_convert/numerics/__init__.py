"""Number formats as pure functions on tensors: E2M1 codes, E4M3, nibbles, group scales."""
