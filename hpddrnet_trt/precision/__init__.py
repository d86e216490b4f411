"""How much precision a model needs."""
