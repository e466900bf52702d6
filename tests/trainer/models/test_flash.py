"""Which FlashAttention is taken, and that nothing is lost on the way to it."""

from __future__ import annotations

import logging
import sys

import pytest
import torch
from fake_flash import EARLY_4, TORCH_SIGNATURE, Installer, clear, dense
from tiny_models import tiny_model
from torch import nn

from s2srm.config import ModelConfig
from s2srm.engine import build
from s2srm.engine.build import check_model
from s2srm.engine.torch_engine import TorchEngine
from s2srm.errors import UserError
from s2srm.models import choice
from s2srm.models.attention import SDPA, packed_flash
from s2srm.models.causal import PackedCausalLM
from s2srm.models.choice import choose_attention, find_attention
from s2srm.models.flash import FLASH_2, FLASH_3, FLASH_4, KERNELS, TORCH, Needs, needs_of
from s2srm.models.load import load_lm

CUDA = torch.device("cuda", 0)
LENGTHS = (5, 1, 7, 3)
CU_SEQLENS = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
VERSIONS = {FLASH_2: "2.8.3", FLASH_3: "3.0.0", FLASH_4: "4.0.0"}


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    """An Installer with a Hopper GPU and nothing installed but torch."""
    for name in ("flash_attn", "flash_attn.cute", "flash_attn_interface"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    made = Installer(tmp_path, monkeypatch)
    made.gpu(9)
    made.install_torch()
    yield made
    monkeypatch.undo()
    clear()


def found(needs=Needs(), dtype=torch.bfloat16, device=CUDA):  # noqa: B008
    return find_attention(device, dtype, needs)


@pytest.mark.parametrize(
    ("capability", "order"),
    [
        ((8, 0), [FLASH_2, TORCH]),
        ((8, 9), [FLASH_2, TORCH]),
        ((9, 0), [FLASH_3, FLASH_2, FLASH_4, TORCH]),
        ((10, 0), [FLASH_4, FLASH_2, TORCH]),
        ((12, 0), [FLASH_2, FLASH_4, TORCH]),
        ((7, 5), []),
    ],
)
def test_the_order_on_each_gpu(fakes, capability, order):
    """The best one that is installed, down to SDPA; none where it has no kernels."""
    fakes.gpu(*capability)
    assert found().name == (order[-1].name if order else SDPA)
    for kernel in reversed([k for k in order if k is not TORCH] or list(VERSIONS)):
        fakes.install(kernel, VERSIONS[kernel])
        assert found().name == (kernel.name if order else SDPA)


def test_packages_that_share_an_import_name_are_told_apart(fakes):
    """flash_attn is the folder of flash-attn-4 too, and flash-attn carries an old cute."""
    fakes.install(FLASH_4, "4.0.0")
    assert found().name == FLASH_4.name
    assert FLASH_2.version is None and FLASH_4.version == "4.0.0"


def test_a_package_that_cannot_be_imported_is_passed_by_and_named(fakes):
    fakes.install(FLASH_3, "3.0.0", "broken")
    fakes.install(FLASH_2, "2.8.3")
    chosen = found()
    assert chosen.name == FLASH_2.name
    assert "flash-attn-3: cannot be imported: ModuleNotFoundError" in chosen.words


@pytest.mark.parametrize(
    ("capability", "needs", "name", "said"),
    [
        ((9, 0), Needs(softcap=True), SDPA, "torch: it has no softcap"),
        ((9, 0), Needs(head_dim=12), SDPA, "head dimension 12 is not a multiple of 8 up to 256"),
        ((9, 0), Needs(head_dim=264), SDPA, "head dimension 264"),
        ((9, 0), Needs(window=True), TORCH.name, ""),
    ],
)
def test_what_torch_alone_cannot_do(fakes, capability, needs, name, said):
    fakes.gpu(*capability)
    assert found(needs).name == name
    assert said in found(needs).words


@pytest.mark.parametrize(
    ("capability", "needs", "can"),
    [
        ((10, 0), Needs(head_dim=256), True),
        ((10, 0), Needs(head_dim=256, window=True), False),
        ((10, 0), Needs(head_dim=256, softcap=True), False),
        ((10, 0), Needs(head_dim=192), False),
        ((10, 0), Needs(softcap=True, window=True), True),
        ((12, 0), Needs(softcap=True), False),
        ((9, 0), Needs(head_dim=256, softcap=True, window=True), True),
        ((8, 0), Needs(), False),
    ],
)
def test_what_version_4_can_do(fakes, capability, needs, can):
    fakes.gpu(*capability)
    fakes.install(FLASH_4, "4.0.0")
    assert (found(needs).name == FLASH_4.name) == can
    if not can:
        assert "flash-attn-4: " in found(needs).words


def test_a_signature_without_what_the_model_needs_is_not_taken(fakes):
    fakes.install(FLASH_2, "2.5.0", "q, k, v, cu_seqlens_q, cu_seqlens_k, window_size=(-1, -1)")
    assert found(Needs(window=True)).name == FLASH_2.name
    chosen = found(Needs(softcap=True))
    assert chosen.name == SDPA and "flash-attn: version 2.5.0 has no softcap" in chosen.words


def test_what_is_not_deterministic_is_said(fakes):
    assert "deterministic" not in found(Needs(head_dim=256)).words
    fakes.install(FLASH_3, "3.0.0")
    assert "deterministic" not in found(Needs(head_dim=128)).words
    words = found(Needs(head_dim=256)).words
    assert "its gradients are not deterministic: not at head dimension 256" in words
    fakes.gpu(10)
    fakes.install(FLASH_4, "4.0.0b1", EARLY_4)
    assert "version 4.0.0b1 has no such option" in found().words


def test_flash_is_refused_with_every_reason_and_auto_says_why_once(fakes, caplog):
    choice._log_choice.cache_clear()
    config = tiny_model("gemma2-tied", head_dim=16).config
    with pytest.raises(
        UserError,
        match=r"^attention: flash is not possible here: flash-attn-3: not "
        r"installed; .*torch: it has no softcap; take auto or sdpa$",
    ):
        choose_attention("flash", CUDA, torch.bfloat16, config)
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            assert choose_attention("auto", CUDA, torch.bfloat16, config) == SDPA
    assert caplog.text.count("torch: it has no softcap") == 1
    fakes.install(FLASH_2, "2.8.3")
    assert choose_attention("flash", CUDA, torch.bfloat16, config) == FLASH_2.name
    assert choose_attention("flash", CUDA, torch.bfloat16) == FLASH_2.name


def test_without_a_gpu_or_half_precision_it_is_sdpa(fakes):
    fakes.install(FLASH_2, "2.8.3")
    cpu = torch.device("cpu")
    assert "needs a CUDA device, this one is cpu" in found(device=cpu).words
    assert "needs bfloat16 weights, these are torch.float32" in found(dtype=torch.float32).words
    for device, dtype in ((cpu, torch.bfloat16), (CUDA, torch.float32)):
        with pytest.raises(UserError, match=r"^attention: flash is not possible here: Flash"):
            choose_attention("flash", device, dtype)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
def test_arguments_reach_the_kernel(fakes, kernel, softcap, window, heads):
    if kernel is not TORCH:
        fakes.install(kernel, VERSIONS[kernel])
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, h, sum(LENGTHS), 8) for h in (heads[0], heads[1], heads[1])]
    inputs = [torch.randn(s, generator=generator).bfloat16().requires_grad_() for s in shapes]
    arguments = {
        "attention_mask": None,
        "scaling": 0.3,
        "sliding_window": window,
        "softcap": softcap,
        "cu_seq_lens_q": CU_SEQLENS,
        "cu_seq_lens_k": CU_SEQLENS,
        "max_length_q": max(LENGTHS),
        "position_ids": torch.zeros(1, sum(LENGTHS)),
        "sequence_lengths": LENGTHS,
    }
    if kernel is TORCH and softcap:
        with pytest.raises(UserError, match="it has no softcap"):
            packed_flash(kernel)(nn.Module(), *inputs, **arguments)
        return
    out, _ = packed_flash(kernel)(nn.Module(), *inputs, **arguments)
    upstream = torch.randn(out.shape, generator=generator).bfloat16()
    grads = torch.autograd.grad(out, inputs, upstream)
    left = None if window is None else window - 1
    right = dense(
        *(x[0].transpose(0, 1) for x in inputs),
        CU_SEQLENS,
        scale=0.3,
        left=left,
        right=0,
        softcap=softcap or 0.0,
    )[None]
    torch.testing.assert_close(out, right, rtol=0, atol=0)
    for grad, wanted in zip(grads, torch.autograd.grad(right, inputs, upstream), strict=True):
        torch.testing.assert_close(grad, wanted, rtol=2e-2, atol=2e-2)
    (call,) = fakes.calls
    longest = call["max_q"] if kernel is TORCH else call["max_seqlen_q"]
    assert longest == max(LENGTHS)
    assert call.get("deterministic", True)


def test_values_narrower_than_queries_are_padded(fakes):
    fakes.install(FLASH_3, "3.0.0")
    q, k, v = (torch.randn(1, 2, sum(LENGTHS), d).bfloat16() for d in (16, 16, 8))
    kwargs = {"cu_seq_lens_q": CU_SEQLENS, "max_length_q": max(LENGTHS)}
    out, _ = packed_flash(FLASH_3)(nn.Module(), q, k, v, None, **kwargs)
    packed = [x[0].transpose(0, 1) for x in (q, k, v)]
    wanted = dense(*packed, CU_SEQLENS, scale=None, left=None, right=0, softcap=0.0)
    torch.testing.assert_close(out[0], wanted)
    assert fakes.calls[0]["v"].shape[2] == 16


def test_early_versions_get_no_more_than_they_take(fakes):
    """Version 4's first releases; torch's varlen without enable_gqa."""
    fakes.gpu(10)
    fakes.install(FLASH_4, "4.0.0b1", EARLY_4)
    q, k, v = (torch.randn(1, h, sum(LENGTHS), 8).bfloat16() for h in (4, 2, 2))
    kwargs = {"cu_seq_lens_q": CU_SEQLENS, "max_length_q": max(LENGTHS), "sliding_window": 3}
    first, _ = packed_flash(FLASH_4)(nn.Module(), q, k, v, None, **kwargs)
    fakes.install_torch(TORCH_SIGNATURE.replace("enable_gqa=False, ", ""))
    second, _ = packed_flash(TORCH)(nn.Module(), q, k, v, None, **kwargs)
    assert torch.equal(first, second)
    assert fakes.calls[1]["key"].shape[1] == 4


def test_what_flash_cannot_take_is_refused_in_the_call(fakes):
    fakes.install(FLASH_3, "3.0.0")
    x = torch.zeros(1, 2, sum(LENGTHS), 8)
    kwargs = {"cu_seq_lens_q": CU_SEQLENS, "max_length_q": max(LENGTHS)}
    with pytest.raises(UserError, match=r"takes bfloat16, .* are torch\.float32"):
        packed_flash(FLASH_3)(nn.Module(), x, x, x, None, **kwargs)
    x = x.bfloat16()
    with pytest.raises(UserError, match="attention to later tokens"):
        packed_flash(FLASH_3)(nn.Module(), x, x, x, None, is_causal=False, **kwargs)
    fakes.gpu(8)
    with pytest.raises(UserError, match=r"its kernels are Hopper's, this GPU is capability 8\.0"):
        packed_flash(FLASH_3)(nn.Module(), x, x, x, None, **kwargs)


def test_generation_with_padding_goes_by_sdpa(fakes):
    fakes.install(FLASH_2, "2.8.3")
    lm = tiny_model("llama").bfloat16()
    ids = torch.tensor([[7, 7, 3, 4], [1, 2, 3, 4]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    wanted = lm.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    lm.set_attn_implementation(FLASH_2.name)
    made = lm.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    assert torch.equal(made, wanted) and not fakes.calls


@pytest.mark.parametrize(
    ("name", "kernel", "needs"),
    [
        ("llama", FLASH_3, Needs(8)),
        ("gemma2-tied", FLASH_2, Needs(8, softcap=True, window=True)),
        ("gemma3", FLASH_4, Needs(8, window=True)),
    ],
)
def test_models_pass_the_check_at_load_with_flash(fakes, name, kernel, needs):
    fakes.install(kernel, VERSIONS[kernel])
    lm = tiny_model(name, head_dim=8).bfloat16()
    assert needs_of(lm.config) == needs
    lm.set_attn_implementation(found(needs_of(lm.config)).name)
    check_model(TorchEngine(PackedCausalLM(lm, name), None, 1))
    assert lm.config._attn_implementation == kernel.name
    assert {bool(call.get("softcap")) for call in fakes.calls} == {needs.softcap}
    windows = {call["window_size"][0] not in (None, -1) for call in fakes.calls}
    assert (True in windows) == needs.window


@pytest.mark.parametrize("demanded", [False, True])
def test_a_fault_under_flash_changes_to_sdpa_unless_flash_was_asked_for(fakes, caplog, demanded):
    """An undefined kernel (a wheel for another GPU) shows in the check."""
    build.log_change.cache_clear()
    fakes.install(FLASH_2, "2.8.3")
    lm = tiny_model("llama", head_dim=8).bfloat16()
    lm.set_attn_implementation(FLASH_2.name)
    choice.demand(lm, "flash" if demanded else "auto")

    def broken(*args, **kwargs):
        raise RuntimeError("no kernel image is available for execution on the device")

    fakes.monkeypatch.setattr("flash_attn.flash_attn_varlen_func", broken)
    engine = TorchEngine(PackedCausalLM(lm, "somewhere"), None, 1)
    if demanded:
        with pytest.raises(
            UserError, match=r"attention: flash is wrong for llama .*no kernel image"
        ):
            check_model(engine)
        return
    check_model(engine)
    assert lm.config._attn_implementation == SDPA
    assert "no kernel image" in caplog.text


def test_a_load_demands_flash_only_if_asked(fakes, tmp_path):
    lm = tiny_model("llama")
    lm.save_pretrained(tmp_path / "model")
    for wanted in ("auto", "sdpa"):
        loaded = load_lm(ModelConfig(path=str(tmp_path / "model"), attention=wanted), train=False)
        assert not choice.is_demanded(loaded)
