"""Recipes that serve a folder with vLLM, filled in for it, and what vLLM would change. Needs no PyTorch."""
