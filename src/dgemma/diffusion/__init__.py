"""Block diffusion: formulas in sampling.py, the references' rules in policy.py, the loop in generate.py."""

from .draws import CounterDraws, Draws, GlobalDraws
from .generate import Output, Step, generate, settle
from .policy import JAX, TRANSFORMERS, Policy

__all__ = [
    "JAX",
    "TRANSFORMERS",
    "CounterDraws",
    "Draws",
    "GlobalDraws",
    "Output",
    "Policy",
    "Step",
    "generate",
    "settle",
]
