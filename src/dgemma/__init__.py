"""dgemma: text generation by block diffusion.

```python
import dgemma

model = dgemma.load("demo")
print(model.generate("JSON: Mara is a 34-year-old baker from Lisbon.").text)
```
Importing this package loads neither torch nor the network: the names below are fetched when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import CapacityError, CheckpointError, ConfigError, DGemmaError, Draining, QueueFull, RequestError
from .events import Commit, Draft, Early, Event, Finish, Result, Stats, TokenLogprob, ToolCall
from .params import GenerationConfig, SamplingParams

if TYPE_CHECKING:
    from .api import EngineSettings, Model, load
    from .batch.mapping import map as map  # not in __all__: a star import is not to hide Python's own

__version__ = "0.1.0"

__all__ = [
    "CapacityError",
    "CheckpointError",
    "Commit",
    "ConfigError",
    "DGemmaError",
    "Draft",
    "Draining",
    "Early",
    "EngineSettings",
    "Event",
    "Finish",
    "GenerationConfig",
    "Model",
    "QueueFull",
    "RequestError",
    "Result",
    "SamplingParams",
    "Stats",
    "TokenLogprob",
    "ToolCall",
    "load",
]


def __getattr__(name: str) -> Any:
    if name == "map":
        return importlib.import_module(".batch.mapping", __name__).map
    if name in ("EngineSettings", "Model", "load"):
        return getattr(importlib.import_module(".api", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
