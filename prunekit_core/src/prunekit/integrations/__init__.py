"""Pruning inside of other people's training loops: Lightning, transformers and Accelerate, each with an extra of that name.

And adapters for other people's layers: torchvision's, which come into play by themselves.
"""
