"""Share a model: push its folder to the Hugging Face Hub, with a model card from its run.

    hf auth login
    python recipes/push_to_hub.py --model out/demo --repo_id me/my-gpt --private

A LoRA adapter alone, to be used with its base, or merged into the base:

    python recipes/push_to_hub.py --model out/chat-lora --repo_id me/my-chat-lora --base_model me/my-gpt
    python recipes/push_to_hub.py --model out/chat-lora --repo_id me/my-chat --merge

As a gpt2, llama or qwen3, for vLLM and other programs without hfllm's code:

    python recipes/push_to_hub.py --model out/demo --repo_id me/my-gpt-qwen3 --native

Weights, tokenizer, chat template, code, card, page and curves are pushed in one commit; checkpoints, logs and paths of
this machine are not. The same command again sends what has changed. The token comes from `hf auth login` or HF_TOKEN.
"""

import contextlib
import dataclasses
import logging
import os
import tempfile
from pathlib import Path

import hfllm  # noqa: F401  (registers the model with transformers)
from hfllm.cli import options as groups
from hfllm.cli.arguments import run
from hfllm.cli.options import Location, arguments, differs, option
from hfllm.hub import check_repo_id, push_to_hub
from hfllm.hub.contents import check_model_folder
from hfllm.hub.forms import save_adapter_alone, save_merged, save_native
from hfllm.runs.lock import run_lock

from transformers.utils.logging import disable_progress_bar


@arguments
class PushArguments(groups.Model, groups.Adapter, groups.Config):
    model = differs(
        dataclasses.MISSING, help="Folder of the model or adapter: the output_dir of a run.", location=Location.READ
    )
    adapter: bool = differs(False, help="Push the LoRA adapter only: the folder, or adapter/ in it.", location=None)
    merge: bool = option(False, section="model", help="Merge the adapter into its base, and push the whole model.")
    native: bool = option(
        False, section="model", help="Push the model as a gpt2, llama or qwen3, without hfllm's code."
    )
    repo_id: str = option(section="Hub", help="Repository, owner/name; created if it does not exist.")
    private: bool = option(False, section="Hub", help="Make the repository private.")
    revision: str | None = option(
        None, section="Hub", help="Branch to push to; created if it does not exist.", default_is="main"
    )
    base_model: str | None = option(
        None, section="Hub", help="Hub id of the adapter's base, if the adapter names a local folder."
    )
    overwrite: bool = option(False, section="Hub", help="Replace another model in the repository; its history stays.")
    commit_message: str | None = option(None, section="Hub", help="Message of the commit.")

    def check(self) -> None:
        """Reject options that exclude each other before anything is loaded or sent."""
        check_repo_id(self.repo_id)
        folder = Path(self.model).expanduser()
        kind = check_model_folder(folder)
        if self.adapter and kind == "model" and (folder / "adapter" / "adapter_config.json").exists():
            kind = "adapter"  # a fine-tuning recipe left it beside the merged model
        if self.adapter and self.merge:
            raise ValueError("--adapter pushes the adapter alone, --merge the whole model. Leave one of them out.")
        for name in ("adapter", "merge", "base_model"):
            if getattr(self, name) and kind != "adapter":
                raise ValueError(f"--{name} is for a LoRA adapter, but {self.model} holds a whole model. Leave it out.")
        if self.native and kind == "adapter" and not self.merge:
            raise ValueError("--native is for whole models: give --merge too, or leave --native out.")


def main(args: PushArguments) -> None:
    args.check()
    logging.basicConfig(format="%(message)s")
    disable_progress_bar()
    # Otherwise a run or an export that writes into the folder meanwhile would be pushed in part.
    model = Path(args.model).expanduser()
    lock = run_lock(model, recipe="push_to_hub") if os.access(model, os.W_OK) else contextlib.nullcontext()
    with lock, tempfile.TemporaryDirectory() as beside, tempfile.TemporaryDirectory() as native:
        # 1. The model in the form to push
        folder = args.model
        if args.adapter and not (Path(folder).expanduser() / "adapter_config.json").exists():
            save_adapter_alone(folder, beside)
            folder = beside
        if args.merge:
            save_merged(folder, beside)
            folder = beside
        if args.native:
            save_native(folder, native)
            folder = native

        # 2. One commit, complete or not at all
        address = push_to_hub(
            folder,
            args.repo_id,
            private=args.private,
            revision=args.revision,
            overwrite=args.overwrite,
            base_model=args.base_model,
            commit_message=args.commit_message,
        )

    # 3. Its address
    print(f"Pushed: {address}\nIts model card says what it is and how to open it.")


if __name__ == "__main__":
    run(main, PushArguments, description=__doc__)
