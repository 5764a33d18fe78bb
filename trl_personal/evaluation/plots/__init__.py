"""Pictures of results. They are written to files without a display; nothing is shown or kept open."""

from .accuracy import plot_report
from .length import plot_length_by_user
from .measures import plot_measures
from .training import plot_training_curves
from .user_map import plot_user_map


__all__ = ["plot_length_by_user", "plot_measures", "plot_report", "plot_training_curves", "plot_user_map"]
