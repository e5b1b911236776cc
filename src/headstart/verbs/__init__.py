"""The commands, one file each: their options, what they call, what they print.

Start with `train.py`. May import everything but another command.
"""
