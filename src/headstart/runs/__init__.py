"""A run's folder: claimed once, filled with all that repeats and judges the run, and read again.

Begin with `folder.py`. May import: data, features, model, and the ground; not search.
"""
