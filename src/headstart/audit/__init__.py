"""A wing: finds problems in a folder of images from their features.

Start with `findings.py`. May import everything but verbs and other wings; only `verbs/check.py` imports it.
"""
