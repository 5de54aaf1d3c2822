"""Requests to events: continuous batching of canvases over a paged cache."""

from .engine import Engine
from .flights import Flights, answers
from .parallel import Team
from .row import Request
from .settings import EngineSettings, Status
from .ticket import Ticket

__all__ = ["Engine", "EngineSettings", "Flights", "Request", "Status", "Team", "Ticket", "answers"]
