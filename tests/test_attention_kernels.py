"""cuDNN's attention is left out of training where its gradients fail. The kernel itself needs a GPU: see docs/gpu.md."""

import pytest
import torch
from torch.backends import cuda
from torch.nn.attention import SDPBackend, sdpa_kernel
from trl import DPOTrainer

from trl_personal.training import attention_kernels
from trl_personal.training.attention_kernels import sound_attention


@pytest.fixture(params=[True, False], ids=["broken", "sound"])
def fails(request, monkeypatch):
    monkeypatch.setattr(attention_kernels, "cudnn_gradient_fails", lambda device: request.param)
    return request.param


def enabled():
    return (
        cuda.cudnn_sdp_enabled(),
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
    )


def test_a_broken_kernel_is_off_inside_and_back_afterwards(fails):
    before = enabled()
    assert before == (True, True, True, True)
    seen = []

    def step():
        with sound_attention(torch.device("cuda")):
            seen.append(enabled())
            raise KeyError

    with pytest.raises(KeyError):
        step()
    assert seen == [(not fails, True, True, True)]
    assert enabled() == before


@pytest.mark.parametrize("backends", [[SDPBackend.MATH], [SDPBackend.CUDNN_ATTENTION]], ids=["math", "cudnn"])
def test_what_the_caller_chose_stays(fails, backends):
    """Without cuDNN, and with nothing else."""
    with sdpa_kernel(backends):
        chosen = enabled()
        with sound_attention(torch.device("cuda")):
            assert enabled() == chosen
        assert enabled() == chosen


@pytest.mark.parametrize("kind", ["individual", "none"])
def test_both_passes_of_a_step_do_without(make_trainer, monkeypatch, fails, kind):
    seen = []
    trainer = make_trainer(max_steps=1, user_model_kind=kind)
    compute_loss, backward = DPOTrainer.compute_loss, trainer.accelerator.backward
    monkeypatch.setattr(
        DPOTrainer,
        "compute_loss",
        lambda *args, **kwargs: seen.append(cuda.cudnn_sdp_enabled()) or compute_loss(*args, **kwargs),
    )
    monkeypatch.setattr(
        trainer.accelerator,
        "backward",
        lambda *args, **kwargs: seen.append(cuda.cudnn_sdp_enabled()) or backward(*args, **kwargs),
    )
    trainer.train()
    assert set(seen) == {not fails}
    assert len(seen) == (2 if kind == "none" else 4)  # the user's term and the generic one
    assert cuda.cudnn_sdp_enabled()


def test_a_device_without_cudnn_is_sound():
    assert not attention_kernels.cudnn_gradient_fails(torch.device("cpu"))
