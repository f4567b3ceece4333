"""Fine-tuning: a file of examples and a folder in; an adapter or a model out. Sits on `loader/` and `chat/`."""
