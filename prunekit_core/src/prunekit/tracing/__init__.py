"""Tracing: one run of a model, every ATen call recorded, every dimension read as an expression over axes."""
