"""Time of Muon's step and the bytes it sends, shared by 1, 2 and 4 processes of one thread each, in turns.

    python docs/measurements/muon_processes.py --output_file muon.json

Run it from the repository's root; `measure.py muon_processes` does, and keeps the numbers. The matrices are those of 6
blocks of 384, in float32 over gloo. Processes that a variant does not use wait. Seconds are those of the variant's
slowest process, the minimum over all rounds: wall time, and CPU time, which does not depend on how many cores are free.
Bytes are counted and compared with the formula that also gives those of larger models on 64 GPUs.
"""

import argparse
import json
import math
import os
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch import multiprocessing, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from hfllm.training.muon import NUM_ITERATIONS, Muon


# Replicas x shards of each variant.
VARIANTS = {
    "one process": (1, 1),
    "DDP, 2 processes": (2, 1),
    "DDP, 4 processes": (4, 1),
    "FSDP2, 2 processes": (1, 2),
    "FSDP2, 4 processes": (1, 4),
    "HSDP, 2 x 2 processes": (2, 2),
}
ON_64_GPUS = {"not shared": (1, 1), "DDP": (64, 1), "FSDP2": (1, 64), "HSDP, 8 x 8": (8, 8)}
OPERATIONS_PER_SECOND, BYTES_PER_SECOND = 400e12, 50e9  # of each GPU: an assumption, not a measurement
MODELS = {
    "124M": {"num_blocks": 12, "hidden_size": 768, "intermediate_size": 2048},
    "7B": {"num_blocks": 32, "hidden_size": 4096, "intermediate_size": 11008},
}


def shapes_of(*, num_blocks: int, hidden_size: int, intermediate_size: int) -> list[tuple[int, int]]:
    """The matrices of a model of the modern preset."""
    attention = [(hidden_size, hidden_size)] * 4
    mlp = [(intermediate_size, hidden_size)] * 2 + [(hidden_size, intermediate_size)]
    return (attention + mlp) * num_blocks


def bytes_sent(shapes: list[tuple[int, int]], replicas: int, shards: int, *, bytes_per_number: int) -> int:
    """The bytes that one process sends to others in a step; docs/several_machines.md has the formula in words."""
    total = 0
    for (short, long), number in Counter(tuple(sorted(shape)) for shape in shapes).items():
        share = math.ceil(number / (replicas * shards))
        slot = max(math.ceil(rows / shards) * columns for rows, columns in ((short, long), (long, short)))
        total += 2 * (shards - 1) * share * slot + (replicas - 1) * shards * share * slot
    return total * bytes_per_number


def multiplications(shapes: list[tuple[int, int]], num_processes: int) -> int:
    """Floating-point operations of the process with the largest share, by Newton and Schulz's iteration."""
    total = 0
    for (short, long), number in Counter(tuple(sorted(shape)) for shape in shapes).items():
        total += math.ceil(number / num_processes) * NUM_ITERATIONS * (4 * short**2 * long + 2 * short**3)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output_file", type=Path, help="also write the numbers there, as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(work, args=(folder, options.rounds), nprocs=4)
        measured = json.loads(Path(folder, "measured.json").read_text(encoding="utf-8"))
    on_paper = {}
    for model, sizes in MODELS.items():
        for name, grid in ON_64_GPUS.items():
            flops = multiplications(shapes_of(**sizes), math.prod(grid))
            num_bytes = bytes_sent(shapes_of(**sizes), *grid, bytes_per_number=2)
            on_paper[f"{model}, {name}"] = {
                "flops": flops,
                "seconds_computing": flops / OPERATIONS_PER_SECOND,
                "bytes_sent": num_bytes,
                "seconds_sending": num_bytes / BYTES_PER_SECOND,
            }
    results = {"rounds": options.rounds, "measured": measured, "on_64_gpus_in_bfloat16": on_paper}
    for name, numbers in measured.items():
        seconds = "{seconds:.3f} s, {cpu_seconds:.3f} s of CPU time".format(**numbers)
        print(f"{name}: {seconds}, {numbers['bytes_sent'] / 1e6:.1f} MB sent by each process")
    for name, numbers in on_paper.items():
        seconds = "{seconds_computing:.4f} s computing, {seconds_sending:.4f} s sending".format(**numbers)
        print(f"on paper, 64 GPUs, {name}: {seconds}, {numbers['bytes_sent'] / 1e9:.3f} GB sent by each")
    if options.output_file is not None:
        options.output_file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def work(rank: int, folder: str, rounds: int) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=4)
    shapes = shapes_of(num_blocks=6, hidden_size=384, intermediate_size=1024)
    optimizers = {name: build(shapes, *grid, rank) for name, grid in VARIANTS.items()}
    sent = count_bytes()
    seconds: dict[str, list[tuple[float, float]]] = defaultdict(list)
    num_bytes = {}
    for number in range(rounds + 1):
        for name, optimizer in optimizers.items():
            sent.clear()
            dist.barrier()
            start, cpu_start = time.perf_counter(), time.process_time()
            if optimizer is not None:
                optimizer.step()
            spent = (time.perf_counter() - start, time.process_time() - cpu_start)
            of_all: list = [None] * 4
            dist.all_gather_object(of_all, spent)
            num_bytes[name] = sum(sent)
            assert optimizer is None or num_bytes[name] == bytes_sent(shapes, *VARIANTS[name], bytes_per_number=4)
            if number > 0:  # the first one warms up
                members = of_all[: math.prod(VARIANTS[name])]
                seconds[name].append(tuple(map(max, zip(*members))))
    if rank == 0:
        results = {
            name: {
                "seconds": min(wall for wall, _ in pairs),
                "cpu_seconds": min(cpu for _, cpu in pairs),
                "bytes_sent": num_bytes[name],
                "seconds_of_all_rounds": [wall for wall, _ in pairs],
            }
            for name, pairs in seconds.items()
        }
        Path(folder, "measured.json").write_text(json.dumps(results), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def build(shapes: list[tuple[int, int]], replicas: int, shards: int, rank: int) -> Muon | None:
    """Muon with matrices on a grid; None in a process that is not in it. To be called by every process."""
    num_processes = replicas * shards
    group = dist.new_group(list(range(num_processes)))
    mesh = DeviceMesh("cpu", torch.arange(num_processes).view(replicas, shards).tolist())
    if rank >= num_processes:
        return None
    torch.manual_seed(0)
    parameters = []
    for shape in shapes:
        weight, gradient = torch.randn(shape), torch.randn(shape)
        if shards > 1:
            weight, gradient = (distribute_tensor(each, mesh, [Replicate(), Shard(0)]) for each in (weight, gradient))
        parameters.append(nn.Parameter(weight))
        parameters[-1].grad = gradient
    return Muon([{"params": parameters, "orthogonal": True}], process_group=group)


def count_bytes() -> list[int]:
    """Have each collective operation of this process note the bytes it sends to others."""
    sent: list[int] = []
    exchange, gather = dist.all_to_all_single, dist.all_gather_single

    def counting_exchange(incoming, outgoing, group, **options):
        sent.append(outgoing.nbytes * (group.size() - 1) // group.size())
        return exchange(incoming, outgoing, group=group, **options)

    def counting_gather(incoming, outgoing, group, **options):
        sent.append(outgoing.nbytes * (group.size() - 1))
        return gather(incoming, outgoing, group=group, **options)

    dist.all_to_all_single, dist.all_gather_single = counting_exchange, counting_gather
    return sent


if __name__ == "__main__":
    main()
