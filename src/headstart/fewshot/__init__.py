"""Meta learning on frozen features: episodes of a few examples, and heads that learn from them."""
