"""What the training commands share: the LightningCLI, and the steps from the fit to the result.

Start with `run.py`. May import: report, and what report may.
"""
