"""How good, how fast: perplexity, benchmarks."""
