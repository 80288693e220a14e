"""Chapter 3: inspect what each attention head attends to, and how likely each token of a prompt is.

    python recipes/inspect_model.py --model out/demo --prompt "def read(self):"
    python recipes/inspect_model.py --model out/demo --prompt "def read(self):" --layer 1 --head 0
    python recipes/inspect_model.py --model openai-community/gpt2 --prompt "The cat sat on the mat" --output_dir out/cat

Writes attention.png (every head; with --layer, attention_layer1.png; with --head, attention_layer1_head0.png),
probabilities.png and inspection.json into `--output_dir`, and prints a summary. Layers and heads count from 0.
`--model` is a folder that a recipe wrote, or any causal language model of the Hub whose layers are attention.
"""

import math
from pathlib import Path
from typing import Any

from hfllm.cli import options as groups
from hfllm.cli.arguments import run
from hfllm.cli.opening import open_causal_lm
from hfllm.cli.options import arguments, check_numbers, differs, option
from hfllm.report import plot_attention, plot_probabilities
from hfllm.runs.files import open_output_dir, write_json
from hfllm.tokenization import load_tokenizer

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.utils.logging import disable_progress_bar


PROMPT = "def read(self, size):\n    data = self.file.read(size)\n    return data\n"
MOST_LAYERS, MOST_HEADS = 12, 16  # in one picture
MOST_CANDIDATES = 100  # at each place; more could not be drawn legibly


@arguments
class InspectArguments(groups.Model, groups.Dtype, groups.Prompt, groups.TopK, groups.OutputDir, groups.Config):
    dtype = differs("float32")
    prompt: str = differs(PROMPT, help="Text to inspect; '' for the start of a document.")
    max_tokens: int = option(
        48, section="generation", help="Tokens of the prompt to inspect; the rest is left out.", at_least=1
    )
    layer: int | None = option(
        None, section="output", help="Draw the heads of this layer only, larger; counted from 0."
    )
    head: int | None = option(None, section="output", help="Draw this head of layer only, with its tokens.")
    top_k = differs(5, help="Number of the likeliest tokens shown at each place.", at_least=1, at_most=MOST_CANDIDATES)
    output_dir = differs("out/inspect", help="Folder of the pictures and numbers.")

    def check(self) -> None:
        check_numbers(self)
        if self.head is not None and self.layer is None:
            raise ValueError(f"--head {self.head} of which layer? Give --layer too; both are counted from 0.")


def main(args: InspectArguments) -> None:
    args.check()

    # 1. The model and its tokenizer
    model = load_model(args.model, args.dtype)
    tokenizer = load_tokenizer(args.model, require_eos=False)

    # 2. The prompt's tokens, after the start token if the tokenizer adds one
    input_ids = encode_prompt(args, tokenizer, model).to(model.device)

    # 3. One pass through the model. Row t of a map is softmax(query of token t @ keys of the tokens up to t): how much
    #    of each token's value goes into what the head writes for token t. Row t of the logits says what follows it.
    with torch.no_grad():
        outputs = model(input_ids, attention_mask=torch.ones_like(input_ids), output_attentions=True, use_cache=False)
    attentions = stack_attentions(outputs.get("attentions"), model)  # (layers, H, T, T)
    log_probabilities = outputs.logits[0].float().log_softmax(-1).cpu()  # (T, V)
    check_choice(args, *attentions.shape[:2])

    # 4. Numbers
    heads, even = describe_heads(attentions)
    tokens, next_tokens = describe_tokens(input_ids[0].tolist(), log_probabilities, tokenizer, args.top_k)
    output_dir = open_output_dir(args.output_dir)
    inputs = {"model": args.model, "prompt": args.prompt}
    numbers = {"tokens": tokens, "next_tokens": next_tokens, "heads": heads, "even_head": even}
    write_json(output_dir / "inspection.json", {**inputs, **numbers}, indent=1)

    # 5. Pictures
    written = [output_dir / "inspection.json", draw_probabilities(args, tokens, next_tokens)]
    if len(tokens) > 1:
        written.append(draw_attention(args, attentions, heads, [token["token"] for token in tokens]))

    # 6. A summary on the terminal
    print_tokens(tokens, next_tokens)
    print_heads(heads, even, len(tokens))
    print("\nWritten: " + ", ".join(map(str, written)))


def load_model(name: str, dtype: str) -> PreTrainedModel:
    """The model, with the attention that keeps its weights."""
    disable_progress_bar()
    try:
        model = open_causal_lm(name, dtype=dtype, attn_implementation="eager")
    except ValueError as error:
        if str(error).startswith("model="):
            raise
        raise ValueError(
            f"--model {name!r} is not a causal language model whose attention can be shown: {error}"
        ) from error
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return model.to(device).eval()


def encode_prompt(args: InspectArguments, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> torch.Tensor:
    """The ids (1, T) to inspect."""
    input_ids = tokenizer(args.prompt, return_tensors="pt", verbose=False).input_ids.long()
    if input_ids.shape[1] == 0:
        if tokenizer.eos_token_id is None:
            raise ValueError("The prompt is empty, and this tokenizer has no start token. Give a --prompt.")
        input_ids = torch.tensor([[tokenizer.eos_token_id]])
    if (num_tokens := input_ids.shape[1]) > args.max_tokens:
        print(f"(Only the first {args.max_tokens:,} of the prompt's {num_tokens:,} tokens are shown: --max_tokens.)")
        input_ids = input_ids[:, : args.max_tokens]
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and input_ids.shape[1] > context:
        raise ValueError(
            f"The prompt has {input_ids.shape[1]:,} tokens, and the model's context is {context:,}. "
            f"Shorten the prompt, or give --max_tokens {context} to inspect its beginning."
        )
    return input_ids


def stack_attentions(attentions: tuple[torch.Tensor | None, ...] | None, model: PreTrainedModel) -> torch.Tensor:
    """The attention weights (layers, H, T, T) of the only row, on the CPU."""
    maps = [layer[0].float().cpu() for layer in attentions or () if layer is not None]
    num_layers = model.config.get_text_config().num_hidden_layers
    if not maps or len(maps) != num_layers or len({layer.shape for layer in maps}) != 1:
        raise ValueError(
            f"{type(model).__name__} gives attention weights of one shape for {len(maps)} of its {num_layers} layers. "
            "This recipe is for models in which every layer is attention, with the same number of heads."
        )
    return torch.stack(maps)


def check_choice(args: InspectArguments, num_layers: int, num_heads: int) -> None:
    for name, chosen, size in (("layer", args.layer, num_layers), ("head", args.head, num_heads)):
        if chosen is not None and not 0 <= chosen < size:
            raise ValueError(f"--{name} {chosen}: {args.model} has {size} {name}s, counted from 0 to {size - 1}.")


MEASURES = ("to_previous", "to_first", "to_itself", "distance", "entropy")
HABITS = {"to_previous": "the previous token", "to_first": "the first token", "to_itself": "itself"}


def describe_heads(attentions: torch.Tensor) -> tuple[list[dict[str, Any]], dict[str, float | None]]:
    """What each head attends to, on average over the tokens from the third on.

    From the third token on, the first token, the previous one and the token itself are three different tokens.
    `to_previous`, `to_first` and `to_itself` are shares of the attention, `distance` is in tokens, `entropy` in nats.
    The second result has the same numbers for a head with uniform attention. With fewer tokens all are None.
    """
    num_layers, num_heads, num_tokens, _ = attentions.shape
    places = [{"layer": layer, "head": head} for layer in range(num_layers) for head in range(num_heads)]
    if num_tokens < 3:
        nothing: dict[str, Any] = dict.fromkeys(MEASURES)
        return [{**place, **nothing, "looks_at": None} for place in places], nothing

    query = torch.arange(2, num_tokens)
    evenly = (torch.ones(num_tokens, num_tokens).tril() / torch.arange(1, num_tokens + 1)[:, None])[2:]  # (T - 2, T)

    def measure(weights: torch.Tensor) -> dict[str, torch.Tensor]:
        """Of weights (..., T - 2, T)."""
        back = (query[:, None] - torch.arange(num_tokens)).clamp(min=0)  # (T - 2, T)
        values = {
            "to_previous": weights[..., query - 2, query - 1],
            "to_first": weights[..., 0],
            "to_itself": weights[..., query - 2, query],
            "distance": (weights * back).sum(-1),
            "entropy": torch.special.entr(weights).sum(-1),
        }
        return {name: value.mean(-1) for name, value in values.items()}

    even = {name: value.item() for name, value in measure(evenly).items()}
    means = measure(attentions[:, :, 2:])
    heads = []
    for place in places:
        numbers = {name: means[name][place["layer"], place["head"]].item() for name in MEASURES}
        heads.append({**place, **numbers, "looks_at": name_habit(numbers, even)})
    return heads, even


def name_habit(head: dict[str, float], even: dict[str, float]) -> str | None:
    """What gets more than half of a head's attention, or "everything evenly"; None if neither is true."""
    share, habit = max((head[name], habit) for name, habit in HABITS.items())
    if share > 0.5:
        return habit
    return "everything evenly" if head["entropy"] > 0.9 * even["entropy"] else None


def describe_tokens(
    input_ids: list[int], log_probabilities: torch.Tensor, tokenizer: PreTrainedTokenizerBase, top_k: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Each token (T) with its probability, nats and rank, given those before it; and the likeliest next tokens."""
    order = log_probabilities.argsort(dim=-1, descending=True, stable=True)  # (T, V)

    def describe(position: int, token_id: int) -> dict[str, Any]:
        probability = log_probabilities[position, token_id].exp().item()
        return {"id": token_id, "token": label_token(tokenizer, token_id), "probability": probability}

    def likeliest(position: int) -> list[dict[str, Any]]:
        return [describe(position, token_id) for token_id in order[position, :top_k].tolist()]

    # Nothing precedes the first token, so nothing predicts it.
    tokens = [{"id": input_ids[0], "token": label_token(tokenizer, input_ids[0]), "probability": None}]
    for position, token_id in enumerate(input_ids[1:]):
        tokens.append(
            {
                **describe(position, token_id),
                "nats": -log_probabilities[position, token_id].item(),
                "rank": (order[position] == token_id).nonzero().item() + 1,
                "likeliest": likeliest(position),
            }
        )
    return tokens, likeliest(len(input_ids) - 1)


BYTE_OF_CHARACTER = {character: byte for byte, character in bytes_to_unicode().items()}
VISIBLE = {" ": "␣", "\n": "↵", "\r": "←", "\t": "→"}


def label_token(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    """A token in readable form: ␣ is a space, ↵ a line's end, → a tab, <E2> a byte of a character cut in two."""
    piece = tokenizer.convert_ids_to_tokens(token_id)
    if piece is None:  # a row of the embedding that the tokenizer does not use
        return f"<unused {token_id}>"
    if token_id in tokenizer.added_tokens_decoder:
        return piece
    is_bytes = "ByteLevel" in str(tokenizer.backend_tokenizer.decoder)
    if is_bytes and BYTE_OF_CHARACTER.keys() >= set(piece):  # each character of a piece means a byte
        raw = bytes(BYTE_OF_CHARACTER[character] for character in piece)
        try:
            piece = raw.decode("utf-8")
        except UnicodeDecodeError:
            return "".join(chr(byte) if 32 < byte < 127 else f"<{byte:02X}>" for byte in raw)
    return "".join(VISIBLE.get(character, character) for character in piece.replace("▁", " "))


def draw_probabilities(args: InspectArguments, tokens: list[dict[str, Any]], next_tokens: list[dict[str, Any]]) -> Path:
    predicted = tokens[1:]
    places = [*(token["likeliest"] for token in predicted), next_tokens]
    return plot_probabilities(
        [token["token"] for token in predicted],
        [token["probability"] for token in predicted],
        [token["rank"] for token in predicted],
        [[(candidate["token"], candidate["probability"]) for candidate in place] for place in places],
        Path(args.output_dir) / "probabilities.png",
        title=f"{args.model}: how likely each token was",
    )


def draw_attention(
    args: InspectArguments, attentions: torch.Tensor, heads: list[dict[str, Any]], labels: list[str]
) -> Path:
    num_layers, num_heads = attentions.shape[:2]
    if args.layer is None:
        name, num_columns = "attention.png", min(num_heads, MOST_HEADS)
        places = [(x, y) for x in spread(num_layers, MOST_LAYERS) for y in spread(num_heads, MOST_HEADS)]
        if len(places) < num_layers * num_heads:
            print(
                f"(attention.png shows {len(places)} of {num_layers * num_heads:,} heads: at most {MOST_LAYERS} layers "
                f"and {MOST_HEADS} heads of each; --layer shows all heads of a layer.)"
            )
    elif args.head is None:
        name, num_columns = f"attention_layer{args.layer}.png", min(num_heads, 4 if num_heads <= 16 else 8)
        places = [(args.layer, head) for head in range(num_heads)]
    else:
        name, num_columns = f"attention_layer{args.layer}_head{args.head}.png", 1
        places = [(args.layer, args.head)]

    titles = []
    for layer, head in places:
        looks_at = heads[layer * num_heads + head]["looks_at"] if num_columns <= 4 else None
        titles.append(f"layer {layer}, head {head}" + (f": {looks_at}" if looks_at else ""))
    if args.head is not None:
        titles, title = [f"{args.model}, {titles[0]}"], None
    else:
        title = f"{args.model}: which tokens (across) each token (down) looks at"
    maps = torch.stack([attentions[place] for place in places]).numpy()
    return plot_attention(maps, titles, labels, Path(args.output_dir) / name, num_columns=num_columns, title=title)


def spread(size: int, most: int) -> list[int]:
    """At most `most` of the numbers from 0 to size - 1, evenly spaced, with both ends."""
    return sorted({round(index) for index in torch.linspace(0, size - 1, min(size, most)).tolist()})


def print_tokens(tokens: list[dict[str, Any]], next_tokens: list[dict[str, Any]]) -> None:
    width = max(10, *(len(token["token"]) for token in tokens))
    print(f"\n  {'token':{width}}  probability     rank   nats  likeliest there")
    for token in tokens:
        if token["probability"] is None:
            print(f"  {token['token']:{width}}  (the first token)")
        else:
            print(
                f"  {token['token']:{width}}  {token['probability']:11.2%}  {token['rank']:7,}  {token['nats']:5.2f}  "
                f"{list_candidates(token['likeliest'][:3])}"
            )
    if predicted := tokens[1:]:
        mean = sum(token["nats"] for token in predicted) / len(predicted)
        plural = "s" if len(predicted) > 1 else ""
        print(f"  {mean:.3f} nats per token over {len(predicted)} token{plural}: a perplexity of {math.exp(mean):,.1f}")
    print(f"\nNext: {list_candidates(next_tokens)}")


def list_candidates(candidates: list[dict[str, Any]]) -> str:
    return "  ".join(f"{candidate['token']} {candidate['probability']:.1%}" for candidate in candidates)


def print_heads(heads: list[dict[str, Any]], even: dict[str, Any], num_tokens: int) -> None:
    if num_tokens < 3:
        print("\nWhat a head attends to can be said from three tokens on: give a longer --prompt.")
        return
    print(
        f"\nWhat the {len(heads):,} heads attend to, on average over the tokens from the third on. Uniform attention "
        f"would give\neach token {even['to_first']:.0%}, at a mean distance of {even['distance']:.1f} tokens, with an "
        f"entropy of {even['entropy']:.2f} nats."
    )
    if len(heads) <= MOST_HEADS:
        print("\n  layer  head  previous  first  itself  distance  entropy  more than half at")
        for head in heads:
            print(
                f"  {head['layer']:5}  {head['head']:4}  {head['to_previous']:8.0%}  {head['to_first']:5.0%}  "
                f"{head['to_itself']:6.0%}  {head['distance']:8.1f}  {head['entropy']:7.2f}  {head['looks_at'] or '-'}"
            )
    print()
    for name, habit in HABITS.items():
        num_mostly = sum(head["looks_at"] == habit for head in heads)
        more = f" ({num_mostly} give it more than half)" if num_mostly else ""
        print(f"  Most at {habit}{more}: {list_heads(heads, name, '.0%')}")
    print(f"  Farthest back: {list_heads(heads, 'distance', '.1f')} tokens")
    print(f"  Most evenly: {list_heads(heads, 'entropy', '.2f')} nats")


def list_heads(heads: list[dict[str, Any]], name: str, number: str, most: int = 3) -> str:
    """The heads with the largest values, in descending order."""
    shown = sorted(heads, key=lambda head: -head[name])[:most]
    return ", ".join(f"layer {head['layer']} head {head['head']} {head[name]:{number}}" for head in shown)


if __name__ == "__main__":
    run(main, InspectArguments, description=__doc__)
