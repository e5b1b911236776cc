"""The backbone's output, computed once: extraction, the cache that keeps it, the matrix that it is read as.

Begin with `extract.py`. May import: model, and the ground.
"""
