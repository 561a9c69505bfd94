"""The demonstration: a small trained model that the package carries, converted and compared."""
