"""Features of the backbone, computed once: extraction, the cache, and the feature matrix.

Start with `extract.py`. May import: model, and the ground.
"""
