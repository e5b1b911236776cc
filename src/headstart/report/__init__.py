"""A head's predictions on a split: as figures, in TensorBoard and as one HTML page.

Start with `evaluation.py`. May import: search, runs, and what those may.
"""
