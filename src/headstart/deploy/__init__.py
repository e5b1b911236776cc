"""A wing: exports a trained head to ONNX or to torchvision's own weights, and draws maps of where the head looks.

Begin with `onnx.py`. May import everything but verbs and other wings; only its commands import it.
"""
