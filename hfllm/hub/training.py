"""Pushes during training, in a thread of their own; a failure of the Hub does not end the run."""

import copy
import os
import shutil
import threading
import warnings
from pathlib import Path

from transformers import PreTrainedModel

from ..runs.sharded import consolidate, is_sharded
from .errors import PushError
from .forms import RUN_FILES
from .push import check_repo_id, open_repository, push_to_hub


SNAPSHOT = ".hub-snapshot"  # in the run's folder


class TrainingPush:
    """Pushes of one run, for its main process. A failure is a warning; the next push sends the missing files.

    Creating one asks the Hub: a token that is missing or may not write there is an error before the training starts. If
    the Hub cannot be reached, that is a warning, because it may be back later.
    """

    def __init__(self, output_dir: str | Path, repo_id: str | None = None, *, private: bool = False):
        self.folder = Path(output_dir)
        self.repo_id = repo_id or self.folder.resolve().name
        self.private = private
        self.thread: threading.Thread | None = None
        check_repo_id(self.repo_id)
        try:
            self.repo_id = open_repository(self.repo_id, private=private)
        except PushError as error:
            if error.is_refusal:
                raise
            warnings.warn(f"{error} The training starts, and pushes when it saves.", stacklevel=2)

    def push_checkpoint(self, checkpoint: str | Path, model: PreTrainedModel, *, step: int) -> None:
        """Push a checkpoint's weights as the model of that step; skipped while an earlier push is running."""
        if self.thread is not None and self.thread.is_alive():
            return
        try:
            snapshot = self._snapshot(Path(checkpoint), model)
        except OSError as error:
            warnings.warn(f"Step {step:,} was not pushed: {error}. The training continues.", stacklevel=2)
            return
        self.thread = threading.Thread(target=self._push, args=(snapshot, f"Step {step:,}"), daemon=True)
        self.thread.start()

    def push_result(self) -> str | None:
        """Push the finished run's folder; returns the commit's address, or None if it failed."""
        if self.thread is not None:
            self.thread.join()
        address = self._push(self.folder, "End of training")
        shutil.rmtree(self.folder / SNAPSHOT, ignore_errors=True)
        return address

    def _push(self, folder: Path, message: str) -> str | None:
        try:
            return push_to_hub(folder, self.repo_id, private=self.private, commit_message=message)
        except Exception as error:  # no error of a push should end a run
            warnings.warn(
                f"{message} was not pushed to {self.repo_id}: {error} The training continues. To push by hand:\n"
                f"    python recipes/push_to_hub.py --model {self.folder} --repo_id {self.repo_id}",
                stacklevel=2,
            )
            return None

    def _snapshot(self, checkpoint: Path, model: PreTrainedModel) -> Path:
        """A folder that training no longer changes, with the checkpoint's weights, linked or put together."""
        snapshot = self.folder / SNAPSHOT
        shutil.rmtree(snapshot, ignore_errors=True)
        snapshot.mkdir()
        for path in self.folder.iterdir():
            is_tokenizer = path.name.startswith(("tokenizer", "chat_template", "special_tokens"))
            if is_tokenizer or path.name in set(RUN_FILES) - {"metrics.json"}:
                shutil.copyfile(path, snapshot / path.name)
        if is_sharded(checkpoint):
            consolidate(checkpoint, "model", snapshot / "model.safetensors")
        else:
            try:
                os.link(checkpoint / "model.safetensors", snapshot / "model.safetensors")
            except OSError:  # a file system without hard links
                shutil.copyfile(checkpoint / "model.safetensors", snapshot / "model.safetensors")
        config = copy.deepcopy(model.config)
        config.architectures = [type(model).__name__.removeprefix("FSDP")]
        config.save_pretrained(snapshot)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(snapshot)
        return snapshot
