"""Whole tensors by name from DeepSpeed's ZeRO, and back.

ZeRO-2 concatenates the parameters of each group in float32, pads the result and gives each process a piece of it and of
the optimizer's state; ZeRO-3 cuts each parameter separately. The pieces depend on the number of processes, so a
checkpoint holds every parameter whole instead, as with DDP and FSDP2. All processes must call these functions together;
DeepSpeed is imported only where it runs.
"""

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn


def configure(accelerator: Accelerator, *, rows_per_device: int, max_grad_norm: float) -> None:
    """Give DeepSpeed the recipe's options that it needs; refuse settings that our checkpoints cannot hold."""
    from transformers.integrations import unset_hf_deepspeed_config

    plugin = accelerator.deepspeed_plugin
    config = plugin.deepspeed_config
    zero = config["zero_optimization"]
    advice = "Use accelerate_configs/deepspeed_zero2.yaml, deepspeed_zero3.yaml or fsdp2.yaml."
    if zero.get("stage") not in (2, 3):
        raise ValueError(f"zero_stage: {zero.get('stage')} is not one that can be saved here; 2 and 3 are. {advice}")
    for part in ("offload_optimizer", "offload_param"):
        if (device := (zero.get(part) or {}).get("device", "none")) != "none":
            raise ValueError(f"{part}_device: {device} is not supported: checkpoints need it on the device. {advice}")
    if accelerator.mixed_precision == "fp16":
        raise ValueError("mixed_precision: fp16 under DeepSpeed cannot be resumed exactly. Use bf16, or FSDP2.")
    if plugin.zero3_init_flag:
        raise ValueError(
            "zero3_init_flag: true would shard the model before its weights are drawn, and give another model. Set "
            f"zero3_init_flag: false in the deepspeed_config. {advice}"
        )
    for name, value in {"gradient_clipping": max_grad_norm, "train_micro_batch_size_per_gpu": rows_per_device}.items():
        if config.get(name, "auto") not in ("auto", value):
            raise ValueError(
                f"The DeepSpeed config says {name}={config[name]}, the recipe {value}. Take it out of the accelerate "
                "file: it is the recipe's option."
            )
        config[name] = value
    unset_hf_deepspeed_config()  # or transformers' from_pretrained would shard the model, see zero3_init_flag above


def gather_weights(model: nn.Module, accelerator: Accelerator) -> dict[str, torch.Tensor]:
    """The float32 weights and persistent buffers by name, on the CPU of the main process; an empty dict elsewhere."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    state = {}
    for name, parameter in model.named_parameters():  # one after the other: no process holds the model whole on its GPU
        if parameter.requires_grad:
            value = safe_get_full_fp32_param(parameter)
        else:  # DeepSpeed keeps no float32 copy of a frozen parameter
            with GatheredParameters([parameter]):
                value = parameter.detach().clone()
        if accelerator.is_main_process:
            state[name] = value.to("cpu", torch.float32, copy=True)
    if accelerator.is_main_process:
        names = model.state_dict().keys()
        state |= {name: buffer.to("cpu", copy=True) for name, buffer in model.named_buffers() if name in names}
    return state


def gather_optimizer(model: nn.Module, zero: Any, accelerator: Accelerator) -> dict[str, Any]:
    """The optimizer's state as torch.distributed.checkpoint returns it: by names, whole, on the main process."""
    from deepspeed.utils import safe_get_full_optimizer_state

    _link(zero)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    state: dict[str, dict[str, Any]] = {}
    for flat, parameters in _partitions(zero):
        for parameter in parameters if zero.optimizer.state.get(flat) else []:
            values = {}
            for what, value in zero.optimizer.state[flat].items():
                if torch.is_tensor(value) and value.shape == flat.shape:
                    value = safe_get_full_optimizer_state(parameter, what)
                if accelerator.is_main_process:
                    values[what] = value.to("cpu", copy=True) if torch.is_tensor(value) else value
            state[names[id(parameter)]] = values
    groups = [
        {**{name: value for name, value in group.items() if name != "params"}, "params": params}
        for group, params in zip(zero.optimizer.param_groups, group_names(model, zero))
    ]
    return {"state": state, "param_groups": groups}


def load_weights(model: nn.Module, tensors: dict[str, torch.Tensor], accelerator: Accelerator) -> None:
    """Load the result of `gather_weights`; `tensors` are read on the main process only."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    for name, parameter in model.named_parameters():
        value = _broadcast(tensors.get(name), shape_of(parameter), accelerator)
        with GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            parameter.copy_(value)
        if not parameter.requires_grad:
            continue
        if is_cut(parameter):
            safe_set_local_fp32_param(parameter, _piece(parameter, value))
        else:
            safe_set_full_fp32_param(parameter, value)
    names = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in names:
            buffer.copy_(_broadcast(tensors.get(name), buffer.shape, accelerator, dtype=buffer.dtype))


def load_optimizer(model: nn.Module, zero: Any, optimizer_state: dict[str, Any], accelerator: Accelerator) -> None:
    """Load the result of `gather_optimizer`; `optimizer_state` is read on the main process only."""
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    # What all processes must know before the tensors come: each state's names, and the numbers among them.
    [plan, groups] = broadcast_object_list(
        [
            {
                name: {
                    what: None if torch.is_tensor(value) and value.dim() > 0 else value
                    for what, value in values.items()
                }
                for name, values in optimizer_state.get("state", {}).items()
            },
            optimizer_state.get("param_groups"),
        ]
    )
    for group, saved in zip(zero.optimizer.param_groups, groups):
        group |= {name: value for name, value in saved.items() if name != "params"}

    names = {id(parameter): name for name, parameter in model.named_parameters()}
    zero.optimizer.state.clear()
    for flat, parameters in _partitions(zero):
        # One number (the step) is shared by all parameters of a piece, which are updated together.
        saved = next((values for parameter in parameters if (values := plan.get(names[id(parameter)]))), {})
        for what, value in saved.items():
            is_number = torch.is_tensor(value)
            zero.optimizer.state[flat][what] = (
                torch.zeros_like(flat) if value is None else value.to(flat.device) if is_number else value
            )
    _link(zero)
    for name, parameter in model.named_parameters():
        for what, number in plan.get(name, {}).items():
            if number is None:
                value = optimizer_state["state"][name][what] if accelerator.is_main_process else None
                value = _broadcast(value, shape_of(parameter), accelerator)
                if is_cut(parameter):
                    safe_set_local_optimizer_state(parameter, _piece(parameter, value), what)
                else:
                    safe_set_full_optimizer_state(parameter, value, what)


def _link(zero: Any) -> None:
    """Give each parameter its place in the state; DeepSpeed 0.19 does so for the first group only, and only once."""
    if hasattr(zero, "bit16_groups") and zero.optimizer.state:
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def group_names(model: nn.Module, zero: Any) -> list[list[str]]:
    """The names of each parameter group's parameters; the optimizer itself only holds pieces."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    if hasattr(zero, "bit16_groups"):
        return [[names[id(parameter)] for parameter in group] for group in zero.bit16_groups]
    groups: list[list[str]] = [[] for _ in zero.optimizer.param_groups]
    for index, parameters in enumerate(zero.fp16_groups):
        groups[zero.sub_group_to_group_id[index]] += [names[id(parameter)] for parameter in parameters]
    return groups


def is_cut(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 holds this parameter."""
    return hasattr(parameter, "ds_id")


def shape_of(parameter: nn.Parameter) -> torch.Size:
    """A parameter's full shape, also if ZeRO-3 has cut it and left an empty tensor in its place."""
    return parameter.ds_shape if is_cut(parameter) else parameter.shape


def _partitions(zero: Any) -> list[tuple[torch.Tensor, list[nn.Parameter]]]:
    """The tensors of the inner optimizer, which are this process's pieces, and the parameters that each is made of."""
    if hasattr(zero, "bit16_groups"):
        return list(zip(zero.single_partition_of_fp32_groups, zero.bit16_groups))
    return list(zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups))


def _piece(parameter: nn.Parameter, value: torch.Tensor) -> torch.Tensor:
    """This process's piece of a whole tensor, cut as ZeRO-3 cuts: flat, padded with zeros to equal pieces."""
    size = parameter.ds_tensor.numel()
    rank = torch.distributed.get_rank(parameter.ds_process_group)
    number = torch.distributed.get_world_size(parameter.ds_process_group)
    return nn.functional.pad(value.flatten(), (0, size * number - value.numel()))[rank * size : (rank + 1) * size]


def _broadcast(
    value: torch.Tensor | None, shape: torch.Size, accelerator: Accelerator, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    if accelerator.is_main_process:
        assert value is not None
        value = value.to(accelerator.device, dtype).contiguous()
    else:
        value = torch.empty(shape, dtype=dtype, device=accelerator.device)
    torch.distributed.broadcast(value, src=0)
    return value
