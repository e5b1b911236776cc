"""A wing: from unlabelled images to labelled ones. Start with ``choose.py``: which images to label next.

May import everything but verbs and other wings; only its commands import it.
"""
