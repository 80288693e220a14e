"""Measure models on held-out text, side by side: nats per token, perplexity, bits per byte; and lm-eval's tasks.

    python recipes/evaluate.py --model out/demo --dataset stdlib --validation_fraction 0.02
    python recipes/evaluate.py --model out/demo openai-community/gpt2 --dataset held-out.jsonl
    python recipes/evaluate.py --model out/base --adapter out/lora --dataset held-out.jsonl --stride 128
    python recipes/evaluate.py --model out/demo --tasks my_task --include_path my_tasks
    accelerate launch --config_file accelerate_configs/ddp.yaml recipes/evaluate.py --model out/demo \\
        --dataset held-out.jsonl

Every token of every document is predicted once, the first from the tokenizer's start token (lm-eval's rolling
log-likelihood does so too), in windows of `--block_size` tokens; a smaller `--stride` gives each token more context.
Bits per byte is what models with different tokenizers share. The numbers go into `metrics.json` of the model's folder,
or of `--output_dir`, beside what training wrote there.
"""

import difflib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator, DistributedType
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.hf_argparser import HfArg
from transformers.utils.logging import disable_progress_bar

import hfllm  # noqa: F401  (registers the model with the Auto classes)
from hfllm.arguments import run
from hfllm.data import load_corpus, split_documents
from hfllm.tokenization import document_encoder, load_tokenizer
from hfllm.training.devices import start_accelerator
from hfllm.training.windows import cut_windows, evaluate_windows


DTYPES = ["float32", "bfloat16", "float16"]
NAMES_KEY = "evaluated"  # in metrics.json: the names that this recipe wrote, and may write again
OTHER_NAME = "evaluate_"  # in front of a name that something else wrote


@dataclass
class EvaluateArguments:
    model: list[str] = HfArg(default_factory=lambda: ["out/demo"], help="Folders or Hub ids of causal models.")
    adapter: str | None = HfArg(default=None, help="Folder or Hub id of a PEFT adapter, on top of the one model.")
    dataset: str | None = HfArg(default=None, help="Text to score: a Hub id, files or folders, or 'stdlib'.")
    dataset_config: str | None = HfArg(default=None, help="Configuration of a dataset on the Hub.")
    split: str = HfArg(default="test", help="Split of a dataset on the Hub; local files are read whole.")
    text_column: str = HfArg(default="text", help="Column that holds the text.")
    validation_fraction: float = HfArg(
        default=0.0, help="Score only what pretrain.py holds out with this fraction; 0: all documents."
    )
    tasks: list[str] | None = HfArg(default=None, help="Tasks of lm-eval (pip install 'hfllm[interop]').")
    include_path: str | None = HfArg(default=None, help="Folder with YAML tasks of your own.")
    limit: int | None = HfArg(default=None, help="Examples of each task, at most; for a first try.")
    block_size: int | None = HfArg(default=None, help="Tokens per window; default: the model's context, at most 1,024.")
    stride: int | None = HfArg(default=None, help="New tokens per further window; default: block_size.")
    per_device_eval_batch_size: int = HfArg(default=8, help="Windows per forward pass.")
    dtype: str = HfArg(default="float32", help="Of the weights: float32, bfloat16 or float16.")
    trust_remote_code: bool = HfArg(default=False, help="Run code that comes with a model.")
    output_dir: str | None = HfArg(default=None, help="Where metrics.json goes; default: the model's folder.")
    cache_dir: str | None = HfArg(default=None, help="Where prepared text is kept.")
    config: str | None = HfArg(default=None, help="A YAML file of these options.")

    def check(self) -> None:
        """Stop at the door what cannot be."""
        names = [Path(name).name for name in self.model]
        problems = [
            (self.dataset is None and not self.tasks, "Measure on what? Give --dataset, --tasks or both."),
            (self.dtype not in DTYPES, f"--dtype {self.dtype}: it is one of {', '.join(DTYPES)}."),
            (self.per_device_eval_batch_size < 1, "--per_device_eval_batch_size must be at least 1."),
            (
                self.adapter is not None and len(self.model) > 1,
                "An --adapter belongs to one --model; several are given.",
            ),
            (
                self.stride is not None and self.stride < 1,
                f"--stride {self.stride}: it must be at least 1.",
            ),
            (
                self.block_size is not None and not 1 <= (self.stride or 1) <= self.block_size,
                f"--stride {self.stride} is larger than --block_size {self.block_size}: tokens would be left out.",
            ),
            (
                self.output_dir is not None and len(set(names)) < len(names),
                f"--output_dir gets a folder for each model, but their names are {names}. Leave it out.",
            ),
            (self.limit is not None and self.limit < 1, f"--limit {self.limit}: it must be at least 1."),
        ]
        if messages := [message for is_wrong, message in problems if is_wrong]:
            raise ValueError("\n".join(messages))


def main(args: EvaluateArguments) -> None:
    args.check()
    disable_progress_bar()
    accelerator = start_accelerator()
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            "Here each process holds a whole model: launch with ddp.yaml or multi_cpu.yaml, which cut none."
        )
    task_manager = find_tasks(args) if args.tasks else None
    for name in args.model:
        check_is_causal(name, args)

    # 1. The text: the same documents for every model
    documents = load_documents(args, accelerator) if args.dataset is not None else None

    results: dict[str, dict[str, Any]] = {}
    for name in args.model:
        # 2. The model, with its own tokenizer
        tokenizer = load_tokenizer(name)
        model = load_model(name, args).to(accelerator.device).eval()
        results[name] = {}

        # 3. Every token of every document once, and what that means per byte
        if documents is not None:
            results[name] |= score_documents(model, tokenizer, documents, args, accelerator)

        # 4. lm-eval's tasks, on the first process
        if task_manager is not None and accelerator.is_main_process:
            results[name] |= run_tasks(model, tokenizer, task_manager, args)
        accelerator.wait_for_everyone()

        # 5. Beside what training wrote
        if accelerator.is_main_process:
            write_metrics(name, results[name], args)
    if accelerator.is_main_process:
        print_table(results)


def check_is_causal(name: str, args: EvaluateArguments) -> None:
    """Refuse what is no causal language model, in words, before anything is loaded."""
    folder = Path(name).expanduser()
    if folder.is_dir() and not (folder / "config.json").exists():
        if (folder / "adapter_config.json").exists():
            raise ValueError(f"--model {name} is an adapter. Give its base as --model, and it as --adapter.")
        found = sorted(path.name for path in folder.iterdir())[:10]
        raise ValueError(f"--model {name} is a folder without a config.json, so no model; it holds {found}.")
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=args.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--model {name!r} is neither a folder nor a model that the Hub gave us: {str(error).splitlines()[0]}"
        ) from error
    if architecture := next((kind for kind in config.architectures or [] if "Classification" in kind), None):
        raise ValueError(
            f"--model {name} is a {architecture}: it labels texts and predicts no tokens. Here only causal language "
            "models are measured; hfllm.metrics.load_metric('calibrated_classification') measures its probabilities."
        )


def load_model(name: str, args: EvaluateArguments) -> torch.nn.Module:
    """The model in `--dtype`, with its adapter if there is one."""
    model = AutoModelForCausalLM.from_pretrained(
        name, dtype=getattr(torch, args.dtype), trust_remote_code=args.trust_remote_code
    )
    if args.adapter is None:
        return model
    folder = Path(args.adapter).expanduser()
    if folder.is_dir() and not (folder / "adapter_config.json").exists():
        raise ValueError(f"--adapter {args.adapter} is a folder without an adapter_config.json, so no PEFT adapter.")
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, args.adapter)
    except (RuntimeError, ValueError, OSError) as error:
        base = json.loads((folder / "adapter_config.json").read_text()) if folder.is_dir() else {}
        raise ValueError(
            f"--adapter {args.adapter} does not fit --model {name}: it was trained on "
            f"{base.get('base_model_name_or_path')!r}. {str(error).splitlines()[0]}"
        ) from error


def load_documents(args: EvaluateArguments, accelerator: Accelerator) -> datasets.Dataset:
    """The parts of the documents, in the columns `text` and `document`."""
    assert args.dataset is not None
    is_local = args.dataset == "stdlib" or Path(args.dataset.split(",")[0].strip()).expanduser().exists()
    if is_local and args.split != "test":
        raise ValueError(
            f"--split {args.split}: only datasets on the Hub have splits; {args.dataset} is local and read whole. "
            "Name the files to score."
        )
    options = {"dataset_config": args.dataset_config, "text_column": args.text_column, "cache_dir": args.cache_dir}
    with accelerator.main_process_first():
        corpus = load_corpus(args.dataset, split="train" if is_local else args.split, **options)
    if args.validation_fraction == 0:
        return corpus.documents
    return split_documents(corpus, validation_fraction=args.validation_fraction)[1]


def score_documents(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    documents: datasets.Dataset,
    args: EvaluateArguments,
    accelerator: Accelerator,
) -> dict[str, Any]:
    context = getattr(model.config, "max_position_embeddings", None)
    block_size = args.block_size or min(context or 1024, 1024)
    if context is not None and block_size > context:
        raise ValueError(f"--block_size {block_size} is more than the model's context of {context}.")
    stride = args.stride or block_size
    if stride > block_size:
        raise ValueError(f"--stride {stride} is larger than the block_size {block_size}: tokens would be left out.")
    encode = document_encoder(tokenizer)
    numbers, texts = np.array(documents["document"]), documents["text"]
    parts = encode(list(texts))
    starts = np.flatnonzero(np.diff(numbers, prepend=-1))  # where documents begin among the parts
    ends = [*starts[1:], len(parts)]
    encoded = [np.concatenate(parts[start:end]) for start, end in zip(starts, ends, strict=True)]
    largest = max(int(ids.max()) for ids in encoded if len(ids))
    if largest >= model.config.vocab_size:
        raise ValueError(
            f"The tokenizer gives the id {largest}, but the model has {model.config.vocab_size} embeddings."
        )
    windows = list(cut_windows(encoded, prefix_token_id=tokenizer.bos_token_id, block_size=block_size, stride=stride))
    num_bytes = sum(len(text.encode()) for text in texts)
    evaluation = evaluate_windows(
        model, windows, num_bytes=num_bytes, batch_size=args.per_device_eval_batch_size, accelerator=accelerator
    )
    return {
        "test_loss": evaluation.loss,
        "test_perplexity": evaluation.perplexity,
        "test_bits_per_byte": evaluation.bits_per_byte,
        "test_tokens": evaluation.num_tokens,
        "test_bytes": evaluation.num_bytes,
        "test_documents": len(encoded),
        "test_dataset": args.dataset,
        "test_block_size": block_size,
        "test_stride": stride,
    }


def find_tasks(args: EvaluateArguments) -> Any:
    """lm-eval's list of tasks; one that it does not know is an error with the nearest name."""
    # A script's own folder comes first in sys.path, where this file would pass for the library `evaluate` of lm-eval.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError("--tasks needs lm-eval: pip install 'hfllm[interop]'.") from error
    if args.include_path is not None and not Path(args.include_path).is_dir():
        raise ValueError(f"--include_path {args.include_path} is not a folder.")
    manager = TaskManager(include_path=args.include_path)
    for name in args.tasks or []:
        if not manager.match_tasks([name]):
            nearest = difflib.get_close_matches(name, manager.all_tasks, n=1, cutoff=0.4)
            raise ValueError(
                f"lm-eval knows no task {name!r}{f'; did you mean {nearest[0]!r}?' if nearest else '.'} "
                "Tasks of your own come from a folder of YAML files: --include_path."
            )
    return manager


def run_tasks(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, manager: Any, args: EvaluateArguments
) -> dict[str, float]:
    """`test_<task>_<metric>` of each task."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    # With add_bos_token lm-eval would count the start token as a prediction.
    language_model = HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=args.per_device_eval_batch_size, add_bos_token=False
    )
    found = lm_eval.simple_evaluate(
        language_model, tasks=args.tasks, task_manager=manager, limit=args.limit, bootstrap_iters=0, log_samples=False
    )
    return {
        f"test_{task}_{metric.removesuffix(',none').replace(',', '_')}": float(value)
        for task, numbers in found["results"].items()
        for metric, value in numbers.items()
        if isinstance(value, int | float) and "stderr" not in metric and metric != "sample_len"
    }


def write_metrics(name: str, numbers: dict[str, Any], args: EvaluateArguments) -> None:
    """Add the numbers to metrics.json; what something else wrote there stays as it is."""
    if args.output_dir is not None:
        folder = Path(args.output_dir) / (Path(name).name if len(args.model) > 1 else "")
    elif args.adapter is not None and Path(args.adapter).is_dir():
        folder = Path(args.adapter)
    elif args.adapter is None and Path(name).is_dir():
        folder = Path(name)
    else:
        print(f"{name} is no folder here, so its numbers are only printed. Give --output_dir to keep them.")
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "metrics.json"
    metrics = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    ours = metrics.get(NAMES_KEY, [])
    renamed = {key: f"{OTHER_NAME}{key}" for key in numbers if key in metrics and key not in ours}
    if renamed:
        print(f"{path} has {', '.join(renamed)} already, from training: ours are named {OTHER_NAME}... there.")
    numbers = {renamed.get(key, key): value for key, value in numbers.items()}
    metrics |= {**numbers, NAMES_KEY: sorted({*ours, *numbers})}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
    print(f"{path}: {len(numbers)} numbers written")


def print_table(results: dict[str, dict[str, Any]]) -> None:
    """One column a model."""
    names = list(dict.fromkeys(key for numbers in results.values() for key in numbers))
    width = max(20, *(len(name) + 2 for name in results))
    first = max(len(name) for name in names) + 2
    print("\n" + " " * first + "".join(f"{name:>{width}}" for name in results))
    for key in names:
        cells = [numbers.get(key, "") for numbers in results.values()]
        texts = [
            f"{cell:.6g}" if isinstance(cell, float) else f"{cell:,}" if isinstance(cell, int) else cell
            for cell in cells
        ]
        print(f"{key:{first}}" + "".join(f"{text:>{width}}" for text in texts))


if __name__ == "__main__":
    run(main, EvaluateArguments, description=__doc__)
