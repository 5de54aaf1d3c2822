"""What a model directory says of weights in few bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..config import ModelConfig
from ..errors import ConfigError
from ..quant.scheme import KEY, Scheme

# Where ModelOpt's older exports say what `config.json` says in newer ones.
MODELOPT_CONFIG = "hf_quant_config.json"


def read_scheme(directory: Path, config: ModelConfig) -> Scheme | None:
    """What `config.json` (or ModelOpt's own file) says of weights in few bits; None: that there are none.

    Raises:
        ConfigError: it describes what is not read.
    """
    path = directory / ("config.json" if config.raw.get(KEY) is not None else MODELOPT_CONFIG)
    try:
        if path.name == "config.json" or not path.is_file():
            return Scheme.read(config.raw)
        section: Any = json.loads(path.read_text(encoding="utf-8"))["quantization"]
        return Scheme.read({KEY: {"quant_method": "modelopt", "quant_algo": section["quant_algo"]}})
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"{path}: not readable ({' '.join(str(error).split())})") from None
