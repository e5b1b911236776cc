"""From files to batches: where images come from, which of them train, and the data module.

Begin with `module.py`. May import: features, model, and the ground.
"""
