"""Reports of a run: its curves, its page, and pictures of what a model does with a prompt."""

from .environment import save_environment
from .page import write_comparison, write_page
from .pictures import plot_attention, plot_curves, plot_probabilities
from .run import read_run, without_places


__all__ = [
    "plot_attention",
    "plot_curves",
    "plot_probabilities",
    "read_run",
    "save_environment",
    "without_places",
    "write_comparison",
    "write_page",
]
