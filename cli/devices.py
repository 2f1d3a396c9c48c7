"""What --device and --mixed_precision come to on this machine."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from sentence_classifier.errors import InputError

if TYPE_CHECKING:
    import torch


def choose_device(name: str | None) -> torch.device:
    """The device asked for, or cuda where there is one, else cpu; of several processes each has its own GPU.

    Raises:
        InputError: no such device here.
    """
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda":
            processes, devices = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
            if processes > devices > 0:
                raise InputError(f"{processes} processes on this machine, and {devices} GPUs; start one for each GPU, "
                                 "or give --device=cpu.")
            if processes > 1:
                device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {name}: not usable on this machine ({reason}).") from None
    return device


def use_device(device: torch.device) -> None:
    """Make a device the one that accelerate and DeepSpeed take, and let fp32 be fp32 on it."""
    import torch

    torch.backends.cudnn.allow_tf32 = False  # else convolutions in fp32 would be computed with 10 bits of mantissa
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # accelerate takes the current one
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed, once imported, need not search for another


def bf16_is_fast(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 run in hardware (AVX512-BF16 or AMX; Ampere or later)."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def choose_precision(mixed_precision: str, device: torch.device) -> str:
    """Resolve --mixed_precision auto|no|bf16|fp16 to what accelerate takes: no, bf16 or fp16."""
    if mixed_precision == "auto":  # accelerate launch has asked its user
        mixed_precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "auto")
    if mixed_precision == "fp8":
        raise InputError("accelerate is configured for fp8, which train.py lacks; give --mixed_precision=bf16.")
    if mixed_precision == "auto":
        return "bf16" if bf16_is_fast(device) else "no"
    if mixed_precision == "fp16" and device.type != "cuda":
        raise InputError("--mixed_precision fp16 needs a CUDA device; use bf16 or auto.")
    return mixed_precision
