"""The commands, one file each: its options, what it calls, what it prints.

Begin with `train.py`. May import everything but another command.
"""
