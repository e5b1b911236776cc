"""A wing: how well a head does on a domain that it was not trained on.

Start with `leave_out.py`. May import everything but verbs and other wings; only `verbs/domains.py` imports it.
"""
