"""Image sources, splits, batches and the data module.

Start with `module.py`. May import: features, model, and the ground.
"""
