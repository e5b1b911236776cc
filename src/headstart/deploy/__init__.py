"""A wing: exports a trained head to ONNX or to weights for torchvision, and draws maps of where the head looks.

Start with `onnx.py`. May import everything but verbs and other wings; only its commands import it.
"""
