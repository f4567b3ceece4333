"""Conversations: how a kind of model wants them written, and a cache that never reads a turn twice."""
