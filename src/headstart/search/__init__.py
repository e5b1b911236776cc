"""Fits without a Trainer on a matrix of features: many heads at once, the exact optimum, intervals.

Begin with `bank.py`. May import: data, features, model, and the ground; not runs.
"""
