"""A wing: from a heap of images without classes to labelled ones. Begin with ``choose``: which images to label next.

May import everything below it, but no other wing; only its verbs import it.
"""
