"""Run folders: created once, filled with everything needed to repeat and judge a run, and read again.

Start with `folder.py`. May import: data, features, model, and the ground; not search.
"""
