"""Preferences with users: every loader returns rows with `prompt`, `chosen`, `rejected` and `user_id`."""

from .generic import load_generic
from .prism import load_prism
from .psoups import load_psoups
from .report import LoadReport
from .synthetic_dialogue import make_dialogue_preferences
from .synthetic_length import make_length_preferences
from .synthetic_style import make_style_preferences
from .tldr import load_tldr


__all__ = [
    "LoadReport",
    "load_generic",
    "load_prism",
    "load_psoups",
    "load_tldr",
    "make_dialogue_preferences",
    "make_length_preferences",
    "make_style_preferences",
]
