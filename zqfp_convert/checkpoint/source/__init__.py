"""The model to convert: from what a user types to tensors, however they lie on disk."""
