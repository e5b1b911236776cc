"""What is trained: a frozen backbone with its weights, a head, the module that holds both, and its checkpoints.

Begin with `backbone.py`, then `classifier.py`. May import: the ground (the modules beside this folder).
"""
