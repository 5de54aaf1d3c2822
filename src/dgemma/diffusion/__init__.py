"""Block diffusion: formulas in sampling.py, the references' rules in policy.py, the loop in generate.py."""

from .canvas import Canvas, Step
from .draws import CounterDraws, Draws, GlobalDraws
from .generate import Output, generate, settle
from .policy import JAX, TRANSFORMERS, Policy

__all__ = [
    "JAX",
    "TRANSFORMERS",
    "Canvas",
    "CounterDraws",
    "Draws",
    "GlobalDraws",
    "Output",
    "Policy",
    "Step",
    "generate",
    "settle",
]
