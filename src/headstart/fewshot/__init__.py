"""A wing: meta-learning on frozen features, with episodes of a few examples and heads that learn from them.

Start with `episodes.py`, then `heads.py`. May import everything but verbs and other wings; only its command imports it.
"""
