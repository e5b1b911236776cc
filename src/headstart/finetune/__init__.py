"""A wing: trains the backbone's last layers too, on the cached output of the frozen ones.

Start with `module.py`; `cut.py` divides the backbone. May import everything but verbs and other wings; only
`verbs/finetune.py` imports it.
"""
