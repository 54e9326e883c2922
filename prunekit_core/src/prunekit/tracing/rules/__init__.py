"""How each operator passes axes on: one rule an operator, one file a family. Importing this registers them."""

from prunekit.axes import Fixed, concat, product
from prunekit.tracing.call import Call
from prunekit.tracing.rules import attention, convolution, indexing, linear, normalization, quantization, reduction, shape
from prunekit.tracing.rules.convolution import GROUPED
from prunekit.tracing.rules.registry import Rule, elementwise, rule, rule_for

__all__ = [
    "GROUPED", "Call", "Fixed", "Rule", "attention", "concat", "convolution", "elementwise", "indexing", "linear",
    "normalization", "product", "quantization", "reduction", "rule", "rule_for", "shape",
]  # fmt: skip
