"""What knows nothing of models: errors, files, memory. Runs without torch."""
