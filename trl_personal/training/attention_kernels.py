"""Keeps an attention kernel whose gradients are not finite out of training."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
import torch.nn.functional as F
from torch.backends.cuda import (
    cudnn_sdp_enabled,
    enable_cudnn_sdp,
    flash_sdp_enabled,
    math_sdp_enabled,
    mem_efficient_sdp_enabled,
)
from torch.nn.attention import SDPBackend, sdpa_kernel


logger = logging.getLogger(__name__)

QUERIES = (192, 1)  # lengths for which gradients of cuDNN's kernels were seen to be NaN
NUM_KEYS, HEAD_WIDTH = 192, 64
SCORE = -120.0  # of every query and key: exp(120) is infinite in float32


@contextmanager
def sound_attention(device: torch.device) -> Iterator[None]:
    """
    Inside, `scaled_dot_product_attention` does without cuDNN where [`cudnn_gradient_fails`]; whatever else the caller allows
    is left as it is. The forward pass chooses the kernel of the backward pass, so both have to be inside.

    Args:
        device (`torch.device`): Where the model is computed.

    ```python
    >>> with sound_attention(torch.device("cpu")):
    ...     pass
    ```
    """
    others = (flash_sdp_enabled, mem_efficient_sdp_enabled, math_sdp_enabled)
    if not (cudnn_sdp_enabled() and any(enabled() for enabled in others) and cudnn_gradient_fails(device)):
        yield
        return
    enable_cudnn_sdp(False)
    try:
        yield
    finally:
        enable_cudnn_sdp(True)


@cache
def cudnn_gradient_fails(device: torch.device) -> bool:
    """
    Whether cuDNN's attention with a mask has gradients that are not finite although all that goes in is: tried once a process
    on the device itself. Seen with torch 2.11 on an H100, where cuDNN is the first choice in bfloat16; a DPO run ends in NaN
    weights (https://github.com/pytorch/pytorch/issues/196678, https://github.com/huggingface/trl/issues/7181).

    ```python
    >>> cudnn_gradient_fails(torch.device("cpu"))
    False
    ```
    """
    if device.type != "cuda" or not torch.cuda.is_bf16_supported(including_emulation=False):
        return False
    fails = any(not _gradients_are_finite(device, num_queries) for num_queries in QUERIES)
    if fails:
        logger.warning(
            "cuDNN's attention has NaN gradients on this machine (pytorch#196678): training steps use the other kernels of "
            "`scaled_dot_product_attention`."
        )
    return fails


def _gradients_are_finite(device: torch.device, num_queries: int) -> bool:
    """Whether cuDNN's gradients are finite for scores that are all equal; also where it has no kernel for the case."""
    query, key, value = (
        torch.zeros(1, 1, length, HEAD_WIDTH, device=device, dtype=torch.bfloat16)
        for length in (num_queries, NUM_KEYS, NUM_KEYS)
    )
    query[..., 0], key[..., 0], value[..., 0] = 1.0, SCORE * HEAD_WIDTH**0.5, 1.0
    inputs = (query.requires_grad_(), key.requires_grad_(), value.requires_grad_())
    mask = torch.ones(1, 1, num_queries, NUM_KEYS, device=device, dtype=torch.bool)
    autocast = torch.autocast(device.type, enabled=False)
    try:
        with torch.enable_grad(), autocast, sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
            gradients = torch.autograd.grad(output, inputs, torch.ones_like(output))
    except RuntimeError:  # no kernel: cuDNN is not chosen either
        return True
    return all(bool(gradient.isfinite().all()) for gradient in gradients)
