"""Measures and checks of models, from outside: nothing in the model knows of them."""
