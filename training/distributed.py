"""Several processes and DeepSpeed: what a launcher says, the Accelerator, ZeRO's sharded state, and lost processes.

A launcher (torchrun, python -m torch.distributed.launch, accelerate launch) starts train.py once for each device and
numbers the processes through environment variables. All processes take the same decisions, since they see the same
sums; the main process writes files and logs.

DeepSpeed's ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054) shards the optimizer's state (stage 1), also the gradients
(2) and also the weights (3) among the processes. Precision is the same as without DeepSpeed: weights in fp32, training
steps under autocast. The state is saved unsharded and in torch's layout: a run can be resumed with another stage or
another number of processes, and without DeepSpeed's own pickles.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
import signal
import warnings
from collections.abc import Iterator
from typing import Any

import accelerate
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, InitProcessGroupKwargs
from accelerate.utils.environment import parse_flag_from_env
from accelerate.utils.other import get_free_port
from torch import Tensor, nn

from sentence_classifier.errors import InputError

logger = logging.getLogger(__name__)

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state of a parameter, beside the number of steps

def make_accelerator(args: argparse.Namespace, device: torch.device, precision: str) -> Accelerator:
    """The Accelerator of this process, for the launcher that started it, the flags and a precision (no, bf16, fp16).

    Raises:
        InputError: the launcher asks for something that this toolkit lacks, or the flags do not go with DeepSpeed.
    """
    for name in ("FSDP", "MEGATRON_LM"):
        if parse_flag_from_env(f"ACCELERATE_USE_{name}"):
            raise InputError(f"accelerate is configured for {name}, which train.py does not use; run accelerate config "
                             "again, or shard the model with --zero_stage=3.")
    plugin = _deepspeed_plugin(args, precision)
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
    handlers: list[Any] = [DistributedDataParallelKwargs(broadcast_buffers=False)]
    if plugin:
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # of DeepSpeed's calls
        _start_deepspeed(args, device)
    else:
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "false"  # --zero_stage=0 beats the launcher
    if "LOCAL_RANK" in os.environ and device.type == "cpu":
        handlers.append(InitProcessGroupKwargs(backend="gloo"))
    reset_accelerate()  # an earlier training in this process may have had another precision
    # Accumulation is the Trainer's own business; without a plugin, a launcher's number would divide the loss once more.
    accumulation = GradientAccumulationPlugin(num_steps=args.gradient_accumulation_steps if plugin else 1)
    # Told that it is on the CPU, accelerate leaves DeepSpeed out.
    accelerator = Accelerator(cpu=device.type == "cpu" and not plugin, mixed_precision="no" if plugin else precision,
                              deepspeed_plugin=plugin, gradient_accumulation_plugin=accumulation,
                              kwargs_handlers=handlers)
    if plugin:  # or else transformers loads the model in shards, before it has been looked at
        from transformers.integrations import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()
    return accelerator


def reset_accelerate(processes: bool = False) -> None:
    """Forget what accelerate knows of this process (and of its group), so that another Accelerator may differ."""
    AcceleratorState._reset_state(reset_partial_state=processes)  # it has no public name


def _deepspeed_plugin(args: argparse.Namespace, precision: str) -> Any:
    """DeepSpeed's settings: from --zero_stage, or else from accelerate launch; None: without DeepSpeed."""
    given = args.zero_stage is not None
    if not (args.zero_stage if given else parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")):
        return None
    try:
        import deepspeed  # noqa: F401
    except ImportError:
        raise InputError("--zero_stage needs the package deepspeed: pip install -r requirements.txt.") from None
    chosen = {"zero_stage": args.zero_stage, "hf_ds_config": "none", "gradient_clipping": args.max_grad_norm,
              "offload_param_device": "none"} if given else {}
    if args.offload_optimizer or given:
        chosen["offload_optimizer_device"] = args.offload_optimizer or "none"
    plugin = accelerate.utils.DeepSpeedPlugin(zero3_init_flag=False, **chosen)
    settings = plugin.deepspeed_config
    zero = settings["zero_optimization"]
    if not zero.get("stage"):
        return None
    for name in ("optimizer", "scheduler"):
        if settings.pop(name, None):
            logger.warning("[the %s of DeepSpeed's configuration is ignored: train.py's flags decide]", name)
    for name in ("fp16", "bf16"):
        if str(settings.pop(name, {}).get("enabled")).lower() == "true":
            precision = name
    for name in [name for name, value in zero.items() if value == "auto"]:
        del zero[name]
    settings |= {"train_micro_batch_size_per_gpu": args.batch_size, "train_batch_size": "auto",
                 "gradient_accumulation_steps": args.gradient_accumulation_steps,
                 "zero_force_ds_cpu_optimizer": False}  # torch's AdamW is as fast, and needs no compiler
    if settings.get("gradient_clipping", "auto") == "auto":
        settings["gradient_clipping"] = args.max_grad_norm
    if precision != "no":
        settings["torch_autocast"] = {"enabled": True, "dtype": {"bf16": "bfloat16", "fp16": "float16"}[precision],
                                      "lower_precision_safe_modules": []}  # processes exchange fp32
    for name in ("compile", "enable_qat", "enable_qat_fx", "enable_diffq"):
        if getattr(args, name):
            raise InputError(f"--{name} does not go with DeepSpeed; train with --zero_stage=0.")
    if zero["stage"] == 3:
        for name in ("ema_decay", "lora_r"):
            if getattr(args, name):
                raise InputError(f"--{name} needs whole weights in each process, and --zero_stage=3 shards them; "
                                 "take --zero_stage=2.")
    return plugin


def _start_deepspeed(args: argparse.Namespace, device: torch.device) -> None:
    if device.type == "cpu":
        if torch.cuda.is_available():
            raise InputError("--device=cpu: DeepSpeed takes the GPUs that it finds; set CUDA_VISIBLE_DEVICES= as well.")
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled now, by each process
        os.environ["ACCELERATE_USE_CPU"] = "false"
    if "LOCAL_RANK" not in os.environ:  # plain python: a group of one
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1",
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(get_free_port())}
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


def prepare(model: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> tuple[Any, Any]:
    """Model and optimizer as training steps use them. The model itself stays usable, in fp32."""
    if accelerator.num_processes > 1 and accelerator.ddp_handler and not is_sharded(accelerator):
        accelerator.ddp_handler.find_unused_parameters = not _all_learn(model)
    prepared = accelerator.prepare(model, optimizer)
    remove_autocast(model)
    return prepared


def remove_autocast(model: nn.Module) -> None:
    """Give a model its own forward back, which accelerate has put under autocast: the Trainer enters it itself."""
    for name in ("forward", "_original_forward"):
        vars(model).pop(name, None)


def _all_learn(model: nn.Module) -> bool:
    """Whether gradients reach all trainable parameters: one sentence shows it."""
    random = torch.get_rng_state()
    ids = torch.ones(1, 3, dtype=torch.int64, device=next(model.parameters()).device)
    model.eval()(ids, ids.bool()).sum().backward()
    reached = all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    model.zero_grad()
    torch.set_rng_state(random)
    return reached


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed steps the optimizer."""
    return accelerator.distributed_type.value == "DEEPSPEED"


def described(accelerator: Accelerator) -> str:
    """What the log says of several processes and DeepSpeed."""
    processes = f", {accelerator.num_processes} processes" if accelerator.num_processes > 1 else ""
    zero = f", ZeRO stage {accelerator.state.deepspeed_plugin.zero_stage}" if is_sharded(accelerator) else ""
    return processes + zero


def total(values: Tensor, accelerator: Accelerator | None) -> Tensor:
    """The sum over all processes; the same in each, bit for bit."""
    if accelerator is None or accelerator.num_processes == 1:
        return values
    return accelerator.reduce(values.to(accelerator.device)).cpu()


# ------------------------------------------------------------------------------------------------------------- ZeRO


def whole_weights(model: nn.Module, accelerator: Accelerator) -> contextlib.AbstractContextManager[None]:
    """A block within which all weights are in each process. To be entered by all processes."""
    if not is_sharded(accelerator):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(model.parameters()))  # nothing to do below stage 3


def optimizer_state(optimizer: Any, parameters: list[nn.Parameter], accelerator: Accelerator) -> dict[str, Any]:
    """The optimizer's state dict in torch's layout, whole in the main process. To be called by all processes.

    `parameters` are those of the optimizer, in its order.
    """
    if not is_sharded(accelerator):
        return optimizer.state_dict()
    from deepspeed.utils import safe_get_full_optimizer_state

    zero = optimizer.optimizer
    state = {}
    if zero.optimizer.state:
        _link_moments(zero)
        steps = next(iter(zero.optimizer.state.values()))["step"].cpu()
        for number, parameter in enumerate(parameters):
            moments = {name: safe_get_full_optimizer_state(parameter, name) for name in MOMENTS}
            if accelerator.is_main_process:
                state[number] = {"step": steps, **{name: moment.cpu() for name, moment in moments.items()}}
    return {"state": state}


def load_optimizer_state(optimizer: Any, parameters: list[nn.Parameter], accelerator: Accelerator,
                         saved: dict[str, Any]) -> None:
    """Load what optimizer_state returned, in a run of any stage and number of processes."""
    if not is_sharded(accelerator):
        optimizer.load_state_dict({**optimizer.state_dict(), **saved})  # of a sharded run there is no more than "state"
        return
    if not saved["state"]:
        return
    from deepspeed.utils import safe_set_full_optimizer_state

    zero = optimizer.optimizer
    flat = getattr(zero, "fp32_partitioned_groups_flat", None) or zero.single_partition_of_fp32_groups
    steps = next(iter(saved["state"].values()))["step"]
    for shard in flat:
        zero.optimizer.state[shard] = {"step": steps.clone().to(shard.device),
                                       **{name: torch.zeros_like(shard) for name in MOMENTS}}
    _link_moments(zero)
    for number, parameter in enumerate(parameters):
        for name in MOMENTS:
            safe_set_full_optimizer_state(parameter, saved["state"][number][name].to(parameter.device), name)


def _link_moments(zero: Any) -> None:
    """Let DeepSpeed's stages 1 and 2 find the optimizer's state of all groups.

    They look for it only once, after the step of the first group, and have no public name for looking again.
    """
    if hasattr(zero, "_hp_optimizer_states_linked"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


@contextlib.contextmanager
def ending_together(accelerator: Accelerator, advice: str) -> Iterator[None]:
    """End the block with an InputError when another process dies, or when the launcher ends all processes for that.

    The error ends with the advice.
    """
    if accelerator.num_processes == 1:
        yield
        return

    def told_to_stop(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
        raise InputError(f"told to stop (SIGTERM), as launchers do when another process of the run has died; {advice}")

    before = signal.signal(signal.SIGTERM, told_to_stop)
    try:
        yield
    except RuntimeError as error:
        reason = re.sub(r"^\[\S+\] ", "", str(error).split("\n")[0]).split(". ")[0]
        if not isinstance(error, torch.distributed.DistError) and not _LOST.search(str(error)):
            raise
        raise InputError(f"another process of this run has died ({reason}); {advice}") from None
    finally:
        signal.signal(signal.SIGTERM, before)


_LOST = re.compile(r"gloo|NCCL|by peer|Broken pipe|Connection (closed|refused|reset)|store", re.IGNORECASE)
