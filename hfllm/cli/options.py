"""Every option of the recipes, declared once: its type, default, help and range, and whether it identifies a run.

A recipe's arguments are made of the groups below. The recipe declares its own few options, and for the others only what
differs:

    @arguments
    class TokenizerArguments(TrainingDataset, TextColumn, VocabSize, Cache, Overwrite, Config):
        output_dir = differs("out/tokenizer", help="Folder of the tokenizer.")
        max_bytes: int = option(2**30, help="Most bytes of text to train on.", at_least=1)

`--help` lists the groups in the order in which the class names them, and the recipe's own options last.
"""

import dataclasses
import inspect
import json
import math
import os
from collections.abc import Callable
from enum import Enum
from typing import Any, Literal, TypeVar, dataclass_transform

from transformers.hf_argparser import HfArg


T = TypeVar("T")


class Compared(Enum):
    """How an option's value is compared when a run is resumed."""

    BY_VALUE = "another value makes another run"
    BY_CONTENT = "another value makes another run where it leads to other text, or to another tokenizer, model or batch"
    NOT = "the value may change"


class Location(Enum):
    """What the path in an option is to the recipe."""

    READ = "a path that is read"
    READ_OR_NAMED = "a path that is read, the id of something on the Hub, or a name that the recipe knows"
    WRITTEN = "a path that is written to"


@dataclasses.dataclass(frozen=True)
class About:
    """What is declared of an option besides its type and default."""

    help: str
    default_is: Any = None  # what None means; the help text shows it as the default
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    location: Location | None = None
    compared: Compared = Compared.BY_VALUE
    is_hidden: bool = False
    section: str = "options of this recipe"

    @property
    def bounds(self) -> str:
        """The range in words: "at least 0 and less than 1"."""
        lowest, highest = self.at_least, self.at_most
        if lowest is not None and highest is not None:
            return f"a number from {lowest:,} to {highest:,}"
        words = {"at least": lowest, "more than": self.above, "at most": highest, "less than": self.below}
        return " and ".join(f"{word} {bound:,}" for word, bound in words.items() if bound is not None)

    def admits(self, number: float) -> bool:
        return (
            (self.at_least is None or number >= self.at_least)
            and (self.above is None or number > self.above)
            and (self.at_most is None or number <= self.at_most)
            and (self.below is None or number < self.below)
        )


def option(
    default: Any = dataclasses.MISSING,
    *,
    default_factory: Callable[[], Any] | Any = dataclasses.MISSING,
    help: str,
    **about: Any,
) -> Any:
    """Declare an option; without a default it is required. The other keywords are the fields of `About`.

    By default (`compared`), a run that is resumed with another value is another run.
    """
    return HfArg(default=default, default_factory=default_factory, metadata={"about": About(help, **about)})


class _Changes(dict):
    """The arguments of `differs`."""


_UNCHANGED = object()


def differs(default: Any = _UNCHANGED, **changes: Any) -> Any:
    """Change an option of one of the recipe's groups: its default, help, or other fields of `About`.

    With an annotation, `model: list[str] = differs(...)`, its type changes too; without a default
    (`dataclasses.MISSING`) it is required.
    """
    return _Changes(changes if default is _UNCHANGED else {"default": default, **changes})


@dataclass_transform(kw_only_default=True, field_specifiers=(option, differs))
def arguments(cls: type[T]) -> type[T]:
    """Make a dataclass of a class of options and the groups that it inherits from."""
    types: dict[str, Any] = {}
    fields: dict[str, dataclasses.Field] = {}
    changes: dict[str, _Changes] = {}
    for group in _in_reading_order(cls):
        types |= inspect.get_annotations(group)
        for name, value in group.__dict__.items():
            if isinstance(value, _Changes):
                changes[name] = value
            elif isinstance(value, dataclasses.Field):
                assert name not in fields, f"{cls.__name__} has two declarations of {name}"
                section = (group.__doc__ or "").split("\n")[0]
                fields[name] = value if group is cls else _changed(value, {"section": section})
    assert changes.keys() <= fields.keys(), f"{cls.__name__} changes {changes.keys() - fields.keys()}, which it has not"
    for name, field in fields.items():
        setattr(cls, name, _changed(field, changes[name]) if name in changes else field)
    cls.__annotations__ = {name: types[name] for name in fields}
    return dataclasses.dataclass(kw_only=True)(cls)


def _in_reading_order(cls: type) -> list[type]:
    """The class after those that it inherits from, in the order in which it names them."""
    classes = [each for base in cls.__bases__ for each in _in_reading_order(base)]
    return list(dict.fromkeys([*classes, cls]))


def about_of(field: dataclasses.Field) -> About:
    """What was declared of a field of a recipe's arguments."""
    return field.metadata.get("about") or About(field.metadata.get("help", ""))


def _changed(field: dataclasses.Field, changes: dict[str, Any]) -> dataclasses.Field:
    of_about = {name: value for name, value in changes.items() if name not in ("default", "default_factory")}
    defaults = {name: value for name, value in changes.items() if name in ("default", "default_factory")}
    defaults = defaults or {"default": field.default, "default_factory": field.default_factory}
    if "default" in changes and "default_is" not in changes:
        of_about["default_is"] = None
    return HfArg(**defaults, metadata={"about": dataclasses.replace(about_of(field), **of_about)})


def values_of(arguments: Any, *groups: type) -> dict[str, Any]:
    """The values of the options that these groups have."""
    return {
        name: getattr(arguments, name)
        for group in groups
        for each in group.__mro__
        for name, value in each.__dict__.items()
        if isinstance(value, dataclasses.Field)
    }


def identity_of(arguments: Any, *, by_content: bool = False) -> dict[str, Any]:
    """The options that make another run when they change, as JSON holds them.

    A recipe that compares the text, the tokenizer, the model and the batch themselves leaves out the options that lead
    to them (`by_content`): a file that was moved is the same text.
    """
    left_out = {Compared.NOT, Compared.BY_CONTENT} if by_content else {Compared.NOT}
    values = {
        field.name: getattr(arguments, field.name)
        for field in dataclasses.fields(arguments)
        if about_of(field).compared not in left_out
    }
    return json.loads(json.dumps(values))


def changeable_of(arguments: Any) -> dict[str, int | float]:
    """The numbers that may change when a run is resumed, such as `save_steps`."""
    values = {
        field.name: getattr(arguments, field.name)
        for field in dataclasses.fields(arguments)
        if about_of(field).compared is Compared.NOT
    }
    return {
        name: value for name, value in values.items() if not isinstance(value, bool) and isinstance(value, int | float)
    }


def inputs_of(arguments: Any) -> dict[str, Any]:
    """The options that name what the recipe reads, a path or an id of the Hub; those that were given.

    Not `config`, which has been read already. With a LoRA adapter's folder as `model`, its base is read as well.
    """
    reads = (Location.READ, Location.READ_OR_NAMED)
    names = [field.name for field in dataclasses.fields(arguments) if about_of(field).location in reads]
    names = [name for name in names if name != "config"]
    from .opening import base_of_adapter  # imports what opens models, which `--help` can do without

    inputs = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    model, bases = inputs.get("model"), []
    while isinstance(model, str) and (model := base_of_adapter(model)):
        bases.append(model)
    return inputs | ({"the base of model": bases} if bases else {})


def check_numbers(arguments: Any) -> None:
    """Reject numbers that are not finite or out of their option's range. An option that is None was not given.

    Raises:
        ValueError: names each such option, its value and what would do.
    """
    problems = []
    for field in dataclasses.fields(arguments):
        given = getattr(arguments, field.name)
        for value in given if isinstance(given, list) else [given]:
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if not math.isfinite(value):
                problems.append(f"--{field.name} {value}: give a finite number.")
            elif not about_of(field).admits(value):
                problems.append(f"--{field.name} {value}: give {about_of(field).bounds}.")
    if problems:
        raise ValueError(" ".join(problems))


# --- Text -------------------------------------------------------------------------------------------------------------


class Dataset:
    """text"""

    dataset: str | None = option(
        "stdlib",
        help="Hub id, local files, folders or patterns (several separated by commas), or 'stdlib': the source of this "
        "Python's standard library.",
        location=Location.READ_OR_NAMED,
        compared=Compared.BY_CONTENT,
    )


class HubDataset(Dataset):
    """text"""

    dataset_config: str | None = option(None, help="Configuration of the Hub dataset.", compared=Compared.BY_CONTENT)
    split: str = option("train", help="Split of the Hub dataset.", compared=Compared.BY_CONTENT)
    delimiter: str | None = option(
        None,
        help="Character between the cells of .csv and .tsv files, e.g. ';' or '\\t'.",
        default_is="what the header shows",
        compared=Compared.BY_CONTENT,
    )


class DocumentSeparator:
    """text"""

    document_separator: str | None = option(
        None,
        help="Line that separates the documents of a text file, e.g. %.",
        default_is="each file is one document",
        compared=Compared.BY_CONTENT,
    )


class ValidationFraction:
    """text"""

    validation_fraction: float = option(
        0.05, help="Share of the text held out for validation.", at_least=0, below=1, compared=Compared.BY_CONTENT
    )


class TrainingDataset(HubDataset, ValidationFraction):
    """text"""

    on_bad_record: Literal["error", "skip"] = option(
        "error", help="Malformed rows: fail or skip.", compared=Compared.BY_CONTENT
    )


class ValidationDataset:
    """text"""

    validation_dataset: str | None = option(
        None,
        help="Hub id or local files to validate on, instead of a share of the dataset.",
        default_is="see validation_fraction",
        location=Location.READ_OR_NAMED,
    )


class ValidationSplit:
    """text"""

    validation_split: str | None = option(
        None,
        help="Split of the Hub dataset to validate on.",
        default_is="see validation_fraction",
        compared=Compared.BY_CONTENT,
    )


class TestFraction:
    """text"""

    test_fraction: float = option(0.1, help="Share held out for the test.", above=0, below=1)


class TestDataset:
    """text"""

    test_dataset: str | None = option(
        None,
        help="Hub id or local files to test on, instead of a share of the dataset.",
        default_is="see test_fraction",
        location=Location.READ_OR_NAMED,
    )


class TextColumn:
    """text"""

    text_column: str = option("text", help="Column or JSON key of the text.", compared=Compared.BY_CONTENT)


class LabelColumn:
    """text"""

    label_column: str = option("label", help="Column or JSON key of the label.")
    label_separator: str | None = option(
        None, help="What stands between several labels in a cell, e.g. ';'.", default_is="a cell holds one label"
    )


class ColumnMap:
    """text"""

    column_map: list[str] | None = option(None, help="Columns to rename, e.g. question=prompt answer=response")


class Tokenizer:
    """text"""

    tokenizer: str | None = option(
        None,
        help="Folder or Hub id of the tokenizer.",
        default_is="the model's",
        location=Location.READ_OR_NAMED,
        compared=Compared.BY_CONTENT,
    )


class BlockSize:
    """text"""

    block_size: int | None = option(None, help="Longest row in tokens.", default_is="the model's context", at_least=1)


class Stride:
    """text"""

    stride: int | None = option(None, help="Tokens from the start of one window to the next.", at_least=1)


class LongTexts(Stride):
    """text"""

    long_texts: Literal["cut", "window"] | None = option(
        "cut",
        help="Texts longer than block_size lose their end, or are read in windows whose logits are averaged.",
    )


class Cache:
    """text"""

    cache_dir: str | None = option(
        None,
        help="Folder for prepared documents and rows.",
        default_is="hfllm in the cache of datasets",
        location=Location.WRITTEN,
        compared=Compared.NOT,
    )


class VocabSize:
    """text"""

    vocab_size: int = option(4096, help="Number of token ids.", at_least=1)


# --- Model ------------------------------------------------------------------------------------------------------------


class Model:
    """model"""

    model: str | None = option(
        "out/demo",
        help="Folder or Hub id of the model.",
        location=Location.READ_OR_NAMED,
        compared=Compared.BY_CONTENT,
    )


class Adapter:
    """model"""

    adapter: str | None = option(
        None, help="Folder or Hub id of a LoRA adapter for the model.", location=Location.READ_OR_NAMED
    )


class Dtype:
    """model"""

    dtype: Literal["float32", "bfloat16", "float16"] | None = option(
        None, help="Data type of the weights.", default_is="as in the model's files"
    )


class RemoteCode:
    """model"""

    trust_remote_code: bool = option(False, help="Run Python code that comes with a model.")


class Shape:
    """model"""

    num_hidden_layers: int | None = option(6, help="Number of blocks.", at_least=1, compared=Compared.BY_CONTENT)
    hidden_size: int | None = option(384, help="Width of the model.", at_least=1, compared=Compared.BY_CONTENT)
    num_attention_heads: int | None = option(6, help="Number of query heads.", at_least=1, compared=Compared.BY_CONTENT)
    num_key_value_heads: int | None = option(
        None,
        help="Number of key and value heads.",
        default_is="num_attention_heads",
        at_least=1,
        compared=Compared.BY_CONTENT,
    )


class Sizing:
    """model"""

    depth: int | None = option(
        None, help="Number of blocks; sets width, learning rates and steps.", at_least=1, compared=Compared.NOT
    )
    max_train_tokens: int | None = option(
        None,
        help="Number of tokens to train on; sets sizes and steps, and depth if it is not given.",
        at_least=1,
        compared=Compared.NOT,
    )
    max_train_minutes: float | None = option(
        None,
        help="Minutes of training and evaluation on this machine, whose speed is measured; sets the same.",
        above=0,
        compared=Compared.NOT,
    )


class Compile:
    """model"""

    torch_compile: bool = option(False, help="Compile the model: slower start, faster steps.", compared=Compared.NOT)


class Attention:
    """model"""

    attn_implementation: Literal["sdpa", "eager", "flex_attention"] | None = option(
        None,
        help="Attention by transformers' name; flex_attention trains on a GPU only.",
        default_is="the fastest for packed documents on the device",
        compared=Compared.NOT,
    )


class Precision:
    """model

    accelerate decides in which precision a recipe computes: `accelerate launch --mixed_precision bf16`. `bf16` is the
    option of some recipes in earlier versions; commands and YAML files with it still work. A run notes it in
    arguments.yaml.
    """

    bf16: bool = option(False, help="Compute in bfloat16.", is_hidden=True)

    def __post_init__(self) -> None:
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if self.bf16 and launched not in ("no", "bf16"):
            raise ValueError(f"bf16=True, but accelerate was launched with mixed_precision {launched}. Leave one out.")
        self.bf16 = self.bf16 or launched == "bf16"


class GradientCheckpointing:
    """model"""

    gradient_checkpointing: bool = option(
        False, help="Compute activations again in the backward pass: less memory, more time."
    )


class Method:
    """model"""

    method: Literal["lora", "full", "last_block", "head"] = option("lora", help="Weights to train.")


class LoRA:
    """LoRA"""

    lora_r: int = option(16, help="Rank of LoRA's matrices.", at_least=1)
    lora_alpha: float = option(16, help="LoRA's output is multiplied by lora_alpha / lora_r.", above=0)
    lora_dropout: float = option(0.0, help="Dropout on the input of LoRA's matrices.", at_least=0, below=1)


# --- Optimization -----------------------------------------------------------------------------------------------------


class MaxSteps:
    """optimization"""

    max_steps: int | None = option(None, help="Optimizer steps.", default_is="see num_train_epochs", at_least=1)


class TrainBatch:
    """optimization"""

    per_device_train_batch_size: int | None = option(
        8, help="Rows per device and forward pass.", at_least=1, compared=Compared.BY_CONTENT
    )


class Seed:
    """optimization"""

    seed: int = option(42, help="Random seed.", at_least=0, at_most=2**32 - 1)  # numpy takes 32 bits


class Training(MaxSteps, TrainBatch, Seed):
    """optimization"""

    num_train_epochs: float | None = option(1.0, help="Passes over the rows, unless max_steps is given.", above=0)
    gradient_accumulation_steps: int | None = option(
        1, help="Forward passes per optimizer step.", at_least=1, compared=Compared.BY_CONTENT
    )
    # Nothing learns at a rate above 10: a typing error is reported before anything is written.
    learning_rate: float | None = option(None, help="Highest learning rate.", at_least=0, at_most=10)
    warmup_steps: int = option(0, help="Steps over which the learning rate rises from 0.", at_least=0)


# The learning-rate schedules of transformers that need no parameters of their own.
ScheduleName = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
]


class Schedule:
    """optimization"""

    lr_scheduler_type: ScheduleName | None = option("linear", help="Learning-rate schedule after warm-up.")
    weight_decay: float = option(0.1, help="Decoupled weight decay of the matrices.", at_least=0)


class EarlyStopping:
    """optimization"""

    early_stopping_patience: int | None = option(
        None,
        help="Stop after this many evaluations in a row without a lower validation loss.",
        default_is="never",
        at_least=1,
    )


class Muon:
    """optimization"""

    optimizer: Literal["muon", "adamw"] | None = option("adamw", help="Optimizer.")
    adam_learning_rate: float | None = option(
        None, help="With Muon, highest learning rate of embeddings, head, norms and biases.", at_least=0, at_most=10
    )
    max_grad_norm: float = option(1.0, help="Longest gradient, by its global norm; 0 does not clip.", at_least=0)


class AdamW:
    """optimization"""

    adam_beta1: float = option(0.9, help="AdamW's decay of the mean.", at_least=0, below=1)
    adam_beta2: float = option(0.95, help="AdamW's decay of the variance.", at_least=0, below=1)
    adam_epsilon: float = option(1e-8, help="AdamW's epsilon.", above=0)


# --- Evaluation and generation ----------------------------------------------------------------------------------------


class EvalBatch:
    """evaluation"""

    per_device_eval_batch_size: int = option(16, help="Rows per device in evaluation.", at_least=1)


class EvalSteps:
    """evaluation"""

    eval_steps: int | None = option(100, help="Steps between two evaluations.", at_least=1)


class KeepBest:
    """evaluation"""

    load_best_model_at_end: bool = option(
        False, help="Save a checkpoint at each evaluation, and keep the one with the lowest validation loss."
    )


class Replies:
    """evaluation"""

    check_answers: bool | None = option(
        False, help="Compare greedy replies with the expected ones, character by character."
    )


class NewTokens:
    """generation"""

    max_new_tokens: int = option(64, help="Longest reply in tokens.", at_least=1)


class NumSamples:
    """generation"""

    num_samples: int = option(1, help="Number of texts for each prompt.", at_least=1)


class Prompt:
    """generation"""

    prompt: list[str] | None = option(
        None, help="Beginning of the text; several are continued side by side.", default_is="the start of a document"
    )


class Sampling:
    """generation"""

    temperature: float = option(0.8, help="Sampling temperature; below 1 favors likely tokens.", at_least=0)
    top_p: float = option(1.0, help="Draw from the likeliest tokens with this total probability.", above=0, at_most=1)


class TopK:
    """generation"""

    top_k: int = option(50, help="Draw from this many of the likeliest tokens; 0: from all.", at_least=0)


# --- Output -----------------------------------------------------------------------------------------------------------


class OutputDir:
    """output"""

    output_dir: str | None = option(
        None,
        help="Folder of the run. A run that was interrupted there is resumed.",
        location=Location.WRITTEN,
        compared=Compared.NOT,
    )


class Overwrite(OutputDir):
    """output"""

    overwrite_output_dir: bool = option(
        False, help="Delete the run in output_dir and start again.", compared=Compared.NOT
    )


class Run(Overwrite):
    """output"""

    logging_steps: int = option(10, help="Steps between two lines of log.jsonl.", at_least=1, compared=Compared.NOT)
    save_total_limit: int | None = option(2, help="Number of checkpoints to keep.", at_least=1, compared=Compared.NOT)


class SaveSteps:
    """output"""

    save_steps: int | None = option(200, help="Steps between two checkpoints.", at_least=1, compared=Compared.NOT)


class Trackers:
    """output"""

    report_to: list[str] | None = option(
        None, help="Experiment trackers, e.g. tensorboard trackio wandb.", compared=Compared.NOT
    )


class Hub:
    """Hub"""

    push_to_hub: bool = option(
        False, help="Push the model to the Hub; a push that fails is a warning.", compared=Compared.NOT
    )
    hub_model_id: str | None = option(
        None, help="Repository, owner/name.", default_is="the name of output_dir", compared=Compared.NOT
    )
    hub_strategy: Literal["every_save", "end"] = option(
        "every_save", help="Push each checkpoint, or the final model only.", compared=Compared.NOT
    )
    hub_private_repo: bool = option(False, help="Make the repository private.", compared=Compared.NOT)


class Config:
    """output"""

    config: str | None = option(
        None,
        help="YAML file of options; the command line overrides it.",
        location=Location.READ,
        compared=Compared.NOT,
    )
