"""The network (readable reference): see transformer.py for the whole, view.py for who sees whom."""

from .transformer import Network
from .view import Cache, Mode, View

__all__ = ["Cache", "Mode", "Network", "View"]
