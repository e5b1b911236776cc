"""A wing: what is wrong with a folder of images, found from their features.

Begin with `findings.py`. May import everything but verbs and other wings; only `verbs/check.py` imports it.
"""
