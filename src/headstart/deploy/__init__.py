"""A wing: exports a trained head to ONNX or to torchvision's own weights, and draws class activation maps.

Begin with `onnx.py`. May import everything but verbs and other wings; only its commands import it.
"""
