"""A wing: the backbone's last layers learn too, on the cached output of the frozen ones.

Begin with `module.py`; `cut.py` divides the backbone. May import everything but verbs and other wings; only
`verbs/finetune.py` imports it.
"""
