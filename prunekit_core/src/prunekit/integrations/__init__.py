"""Pruning inside of other people's training loops: Lightning, transformers and Accelerate, each with an extra of that name."""
