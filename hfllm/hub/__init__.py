"""Sharing: a model's folder on the Hugging Face Hub, with a model card from its run."""

from .card import write_card, write_page_and_card
from .errors import PushError
from .push import check_repo_id, push_to_hub
from .training import TrainingPush


__all__ = ["PushError", "TrainingPush", "check_repo_id", "push_to_hub", "write_card", "write_page_and_card"]
