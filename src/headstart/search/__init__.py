"""Fits on a feature matrix without a Trainer: many heads at once, the exact optimum, confidence intervals.

Start with `bank.py`. May import: data, features, model, and the ground; not runs.
"""
