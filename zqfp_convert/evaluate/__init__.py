"""How close a converted model is to the original."""
