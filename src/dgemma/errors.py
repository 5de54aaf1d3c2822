"""The errors that dgemma raises for people's mistakes; every message is one line that names the thing and the mend."""


class DGemmaError(ValueError):
    """Base of every error that a caller can mend."""


class ConfigError(DGemmaError):
    """A configuration file, setting or flag has an unknown key or a bad value."""


class CheckpointError(DGemmaError):
    """A model directory lacks a file, or a file's content is not what the configuration says."""


class RequestError(DGemmaError):
    """A prompt or a sampling parameter cannot be honoured."""


class CapacityError(DGemmaError):
    """The request or model does not fit: context length, memory."""


class QueueFull(CapacityError):
    """As many requests wait as may wait; the same request may be taken a moment later."""


class Draining(DGemmaError):
    """The engine finishes what runs and takes no new requests."""


class WorkerLost(RuntimeError):
    """What answered for this process has ended, by itself or by another's hand; nobody's request is wrong."""
