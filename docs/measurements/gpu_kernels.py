"""Attention and loss alone on a GPU, by every kernel that torch has for them: python docs/measurements/gpu_kernels.py

Forward and backward of attention over 32 rows of 1,024 tokens, 12 heads of 64, in bfloat16, of whole rows and of packed
documents (of 400 tokens on average); then the head and its loss for 32,768 tokens, 768 channels and 50,304 ids. Each
number is a median in milliseconds. Prints JSON.
"""

import json
from collections.abc import Callable

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.attention.varlen import varlen_attn
from triton.testing import do_bench

from hfllm.model import kernels_gpt


ROWS, HEADS, LENGTH, CHANNELS = 32, 12, 1024, 64
NUM_TOKENS = ROWS * LENGTH


def main() -> None:
    torch.manual_seed(0)
    results = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    results |= {"attention": measure_attention(), "loss": measure_loss()}
    print(json.dumps(results, indent=1))


def measure_attention() -> dict[str, dict[str, float]]:
    shape = (ROWS, HEADS, LENGTH, CHANNELS)
    query, key, value, grad = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
    lengths = torch.randint(1, 800, (NUM_TOKENS // 100,))
    positions = torch.cat([torch.arange(length) for length in lengths])[:NUM_TOKENS].view(ROWS, LENGTH).cuda()
    documents = functional.pad((positions.diff(dim=-1) != 1).cumsum(-1), (1, 0))

    def is_visible(row, head, query_index, key_index):
        return (query_index >= key_index) & (documents[row, query_index] == documents[row, key_index])

    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool, device="cuda").tril()
    mask = mask & (documents[:, None, :, None] == documents[:, None, None, :])
    make_blocks = torch.compile(create_block_mask, dynamic=False)
    blocks = make_blocks(is_visible, ROWS, None, LENGTH, LENGTH, device="cuda")
    causal = create_block_mask(lambda row, head, i, j: i >= j, None, None, LENGTH, LENGTH, device="cuda")
    compiled = torch.compile(flex_attention, dynamic=False)

    flat = [tensor.detach().transpose(1, 2).reshape(NUM_TOKENS, HEADS, CHANNELS).requires_grad_() for tensor in inputs]
    starts = torch.arange(0, NUM_TOKENS + 1, LENGTH, device="cuda")
    starts = torch.cat([starts, (positions.flatten() == 0).nonzero().flatten()]).unique().int()

    def by(backend: SDPBackend) -> Callable[[], torch.Tensor]:
        def attend() -> torch.Tensor:
            with sdpa_kernel(backend):
                return functional.scaled_dot_product_attention(*inputs, is_causal=True)

        return attend

    kernels = {
        "whole rows, SDPA flash": by(SDPBackend.FLASH_ATTENTION),
        "whole rows, SDPA cuDNN": by(SDPBackend.CUDNN_ATTENTION),
        "whole rows, flex": lambda: compiled(*inputs, block_mask=causal),
        "packed, SDPA with a mask": lambda: functional.scaled_dot_product_attention(*inputs, attn_mask=mask),
        "packed, flex": lambda: compiled(*inputs, block_mask=blocks),
        "packed, varlen flash": lambda: varlen_attn(*flat, starts, starts, LENGTH, LENGTH, window_size=(-1, 0)),
    }
    times = {}
    for name, attend in kernels.items():
        upstream = grad.transpose(1, 2).reshape(NUM_TOKENS, HEADS, CHANNELS) if "varlen" in name else grad

        def both(attend: Callable = attend, upstream: torch.Tensor = upstream) -> None:
            attend().backward(upstream)

        both()  # compiles
        times[name] = {
            "forward": do_bench(attend, return_mode="median"),
            "forward and backward": do_bench(both, return_mode="median"),
        }
    making = do_bench(lambda: make_blocks(is_visible, ROWS, None, LENGTH, LENGTH, device="cuda"), return_mode="median")
    return {**times, "the block mask": {"once a batch": making}}


def measure_loss() -> dict[str, dict[str, float]]:
    hidden_states = torch.randn(1, NUM_TOKENS, 768, device="cuda", requires_grad=True)
    weight = torch.randn(50304, 768, device="cuda", requires_grad=True)
    targets = torch.randint(50304, (1, NUM_TOKENS), device="cuda")
    compiled = torch.compile(kernels_gpt.cross_entropy_of_rows, dynamic=False)
    whole = torch.compile(lambda: functional.cross_entropy((hidden_states @ weight.mT).float()[0], targets[0]))

    def pieces(num_rows: int, of_rows: Callable) -> Callable[[], torch.Tensor]:
        def loss() -> torch.Tensor:
            kernels_gpt.LOGIT_ROWS["accelerator"] = num_rows
            return kernels_gpt.linear_cross_entropy(hidden_states, weight, targets, NUM_TOKENS, of_rows)

        return loss

    losses = {f"pieces of {rows:,}, compiled": pieces(rows, compiled) for rows in (2048, 4096, 8192)}
    losses |= {"pieces of 4,096": pieces(4096, kernels_gpt.cross_entropy_of_rows), "whole, compiled": whole}
    results = {}
    for name, loss in losses.items():

        def step(loss: Callable[[], torch.Tensor] = loss) -> None:
            with torch.autocast("cuda", torch.bfloat16):
                value = loss()
            value.backward()
            hidden_states.grad = weight.grad = None

        step()
        torch.cuda.reset_peak_memory_stats()
        results[name] = {"forward and backward": do_bench(step, return_mode="median")}
        results[name]["peak MiB"] = torch.cuda.max_memory_allocated() / 2**20
    return results


if __name__ == "__main__":
    main()
