"""The model: a frozen backbone with its weights, a head, the module that holds both, and its checkpoints.

Start with `backbone.py`, then `classifier.py`. May import: the ground (the modules next to this folder).
"""
