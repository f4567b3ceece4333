"""One model on several processes."""
