"""A wing: a trained head as an ONNX file or as torchvision's own weights, and maps of where it looks.

Begin with `onnx.py`. May import everything but verbs and other wings; only its verbs import it.
"""
