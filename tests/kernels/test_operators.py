import functools
import shutil

import pytest
import torch
import torch.distributed as dist
from torch.library import opcheck

import s2srm_kernels as kernels
from s2srm_kernels import dispatch
from s2srm_kernels.dispatch import _without_autocast
from s2srm_kernels.lm_head.statistics import fake_residual
from s2srm_kernels.options import pack_options
from tests.kernels import naive

NAMES = ["gae", "linear_cross_entropy", "linear_cross_entropy_backward", "linear_logprobs"]
NAMES += ["linear_logprobs_backward", "linear_loss_backward", "linear_ppo_loss"]
NAMES += ["linear_sample", "linear_token_stats", "token_rewards"]
CU = torch.tensor([0, 0, 4, 9], dtype=torch.int32)


def samples(grad):
    """operator name -> its arguments by name, one dictionary an option set."""
    hidden, weight, bias, target = naive.make(9, 4, 11, dtype=torch.float32)
    for t in (hidden, weight, bias):
        t.requires_grad_(grad)
    live_targets = int((target != -100).sum())
    plain, capped = {"temperature": 1.0, "softcap": None}, {"temperature": 0.7, "softcap": 3.0}
    skip = {"skip_mass": 0.1}
    smooth = {"label_smoothing": 0.1, "z_loss": 0.1, "skip_mass": 0.0}
    clip = {"clip_low": 0.2, "clip_high": None, "dual_clip": 3.0, "max_log_ratio": 0.5}
    clip |= {"kl_coef": 0.1, "entropy_coef": 0.1}
    unclipped = {**clip, "dual_clip": None, "max_log_ratio": None, "entropy_coef": 0.0}
    rows = torch.linspace(-1, 1, 9)
    left = {
        "residual": torch.ones_like(fake_residual(target.float())),
        "live": torch.zeros(0, 0, dtype=torch.bool),
    }
    seeds, extra = torch.arange(9), torch.stack([target.clamp(min=0), target * 0 - 1], dim=1)

    draw = {"seeds": seeds, "positions": seeds}

    def head(options, trained=(grad,) * 3, num_live=None, inputs=None, **own):
        inputs = inputs or (hidden, weight, bias, target)
        return {
            **dict(zip(("hidden", "weight", "bias", "target"), inputs, strict=True)),
            **{"options": pack_options(**options), "ignore_index": -100, "num_live": num_live},
            **{"group": None, "needs": list(trained), "main_grad": None, **own},
        }

    def frozen(options, trained=(False,) * 3, **own):
        inputs = [t.detach() for t in (hidden, weight, bias, target)]
        return head(options, trained, inputs=inputs, **own)

    def upstream(entropy=None, lse=None, ids=None):
        given = {"grad_logprobs": rows, "grad_entropy": entropy, "grad_lse": lse, "extra_ids": ids}
        of_ids = dict.fromkeys(("grad_extra", "extra_logprobs"))
        if ids is not None:
            of_ids = {"grad_extra": rows[:, None].expand(9, 2), "extra_logprobs": -torch.ones(9, 2)}
        return {**given, **of_ids, **left}

    def cross_entropy(row_weight, reduction, skips=False, workspace=None, made=grad):
        made = {"workspace_bytes": workspace, "in_forward": made, "owned": False}
        return {"row_weight": row_weight, "reduction": reduction, "skips": skips, **made}

    def ppo(ref, row_weight, normalizer, cu_seqlens=None, entropy=True, made=grad):
        made = {"workspace_bytes": None, "in_forward": made, "owned": False}
        made["entropy_gradient"] = entropy
        given = {"ref_logprobs": ref, "row_weight": row_weight, "normalizer": normalizer}
        given |= {"old_logprobs": rows, "advantages": rows, "cu_seqlens": cu_seqlens}
        return {**given, **made, "with_entropy": entropy}

    two, all_three = (True, False, True), (True, True, True)
    made = [t.detach().clone() for t in (hidden, weight, bias)]
    thresholds = pack_options(max_margin=0.0, positive=1.0, negative=1.0, match=0.0)
    sums = {"rewards": rows, "values": rows, "cu_seqlens": CU}
    return {
        "linear_logprobs": [
            head({**plain, **skip}, extra_ids=None, with_entropy=True, skips=True),
            head({**capped, **skip}, extra_ids=extra, with_entropy=False, skips=False),
            head(
                *({**plain, **skip}, (grad,) * 3, live_targets),
                **{"extra_ids": None, "with_entropy": True, "skips": False},
            ),
        ],
        "linear_logprobs_backward": [
            frozen(capped, all_three, **upstream(rows, rows)),
            frozen(plain, two, **upstream()),
            frozen(plain, all_three, **upstream(ids=extra)),
        ],
        "linear_sample": [
            {**frozen(plain), "target": seeds, **draw, "suppress": None, "greedy": False},
            {**frozen(capped), "target": seeds, **draw, "suppress": seeds[:2], "greedy": True},
        ],
        "linear_token_stats": [
            frozen(plain, extra_ids=None),
            frozen(capped, extra_ids=extra),
        ],
        "linear_cross_entropy": [
            head({**plain, **smooth}, **cross_entropy(rows, "mean")),
            head({**capped, **smooth}, **cross_entropy(None, "sum", workspace=10**6)),
            head({**capped, **smooth}, **cross_entropy(rows, "none", True, made=False)),
        ],
        "linear_cross_entropy_backward": [
            frozen(
                *({**capped, **smooth}, all_three),
                **{"grad_loss": rows, "row_weight": rows, "reduction": "none", **left},
            ),
            frozen(
                *({**plain, **smooth}, (False, True, False)),
                **{"grad_loss": rows[0], "row_weight": None, "reduction": "mean", **left},
            ),
        ],
        "linear_ppo_loss": [
            head({**capped, **clip}, **ppo(rows, rows, torch.tensor(4.0))),
            head({**plain, **unclipped}, **ppo(rows, None, None, CU, False, made=False)),
        ],
        "linear_loss_backward": [
            {
                "grad_loss": torch.tensor(2.0),
                **dict(zip(("d_hidden", "d_weight", "d_bias"), made, strict=True)),
                **dict(zip(("hidden", "weight", "bias"), made, strict=True)),
            }
        ],
        "token_rewards": [
            {
                **{"response": target, "signal": target, "cu_seqlens": CU},
                **{"options": thresholds, "divergence": "argmax", "top_k": 1},
            }
        ],
        "gae": [
            {**sums, "options": pack_options(gamma=0.9, lam=0.8), "bootstrap": None},
            {**sums, "options": pack_options(gamma=1.0, lam=0.5), "bootstrap": torch.ones(3)},
        ],
    }


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, grad):
    op = getattr(torch.ops.s2srm, name).default
    names = [argument.name for argument in op._schema.arguments]
    for sample in samples(grad)[name]:
        assert sorted(sample) == sorted(names)
        opcheck(op, tuple(sample[argument] for argument in names))


def test_every_operator_is_listed_here():
    registered = {
        schema.name.removeprefix("s2srm::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("s2srm::") and not schema.name.startswith("s2srm::cpu_")
    }  # cpu_...: the parts of the cpp engine, no operations
    assert registered == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_backend_has_an_overload_of_the_same_schema(name):
    packet = getattr(torch.ops.s2srm, name)
    assert sorted(packet.overloads()) == ["cpp", "default", "triton"]
    texts = {str(getattr(packet, o)._schema).replace(f".{o}", "") for o in packet.overloads()}
    assert len(texts) == 1


def test_a_backend_is_chosen_as_soon_as_it_registers_a_kernel():
    """What a compiled extension does: one kernel for one overload and device."""
    rows = torch.zeros(3)
    cu = torch.tensor([0, 3])
    args = {"rewards": rows, "values": rows, "cu_seqlens": cu}
    with pytest.raises(ValueError, match="impl='triton' is not available for gae"):
        kernels.gae(**args, impl="triton")
    library = torch.library.Library("s2srm", "IMPL")
    try:
        library.impl("gae.triton", lambda *a: (torch.full((3,), 7.0), torch.full((3,), 8.0)), "CPU")
        assert kernels.gae(**args, impl="triton").advantages.tolist() == [7, 7, 7]
        assert kernels.gae(**args).returns.tolist() == [0, 0, 0]  # auto: not on a CPU
        assert kernels.gae(**args, impl="reference").returns.tolist() == [0, 0, 0]
    finally:
        library._destroy()


def test_a_backend_that_cannot_be_loaded_is_left_out_with_one_warning(monkeypatch):
    def fails(name):
        raise ImportError("_C.so is not there")

    for cached in ("_load", "_warn_once"):
        fresh = functools.cache(getattr(dispatch, cached).__wrapped__)
        monkeypatch.setattr(dispatch, cached, fresh)
    monkeypatch.setattr(dispatch, "_AUTO_CHOICES", {})
    monkeypatch.setattr(dispatch.importlib, "import_module", fails)
    monkeypatch.setattr(dispatch.torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: 0)
    with pytest.warns(
        UserWarning, match="cpp backend .* is not used: _C.so is not there"
    ) as caught:
        for _ in range(2):
            assert dispatch.choose("gae", "auto", torch.device("cpu")) == "reference"
    assert len(caught) == 1
    with pytest.raises(
        ValueError, match=r"impl='cpp' is not available for gae: _C.so is not there"
    ):
        dispatch.choose("gae", "cpp", torch.device("cpu"))


def test_a_gpu_that_triton_does_not_serve(monkeypatch):
    """linear_logprobs has a Triton kernel for CUDA, whether there is a GPU or not."""
    device, has_kernel = torch.device("cuda", 0), {"s2srm::linear_logprobs.triton"}
    monkeypatch.setattr(dispatch, "load", lambda impl, device_type: None)
    monkeypatch.setattr(
        dispatch.torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda o, _: o in has_kernel
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    monkeypatch.setattr(dispatch, "_AUTO_CHOICES", {})
    assert dispatch.choose("linear_logprobs", "auto", device) == "triton"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    monkeypatch.setattr(dispatch, "_AUTO_CHOICES", {})
    fresh = functools.cache(dispatch._warn_once.__wrapped__)
    monkeypatch.setattr(dispatch, "_warn_once", fresh)
    line = r"needs a GPU of compute capability 8\.0 or later, got 7\.5"
    with pytest.warns(UserWarning, match=line):
        assert dispatch.choose("linear_logprobs", "auto", device) == "reference"
    with pytest.raises(ValueError, match=f"impl='triton' is not available.*{line}"):
        dispatch.choose("linear_logprobs", "triton", device)


def test_autocast_is_off_inside_an_operator():
    run = _without_autocast(lambda a: a @ a)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert run(torch.ones(2, 2)).dtype == torch.float32
        assert torch.is_autocast_enabled("cpu")


def _compiled_cases():
    def entropy(h, w, b, t):
        return kernels.linear_logprobs(h, w, t, bias=b, softcap=3.0)

    def cross_entropy(h, w, b, t):
        return [kernels.linear_cross_entropy(h, w, t, bias=b, z_loss=0.01)]

    def cross_entropy_none(h, w, b, t):
        return [kernels.linear_cross_entropy(h, w, t, bias=b, reduction="none")]

    def ppo(h, w, b, t):
        rows = torch.linspace(-3, -1, t.shape[0], dtype=h.dtype)
        loss, metrics = kernels.linear_ppo_loss(
            h, w, t, rows, rows + 2, bias=b, entropy_coef=0.1, normalizer=3.0
        )
        return [loss, *metrics]

    return [entropy, cross_entropy, cross_entropy_none, ppo]


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("case", _compiled_cases(), ids=lambda f: f.__name__)
def test_compiled_fullgraph_with_ignored_rows(case):
    compiled = torch.compile(case, fullgraph=True, backend="aot_eager")
    for n, seed in ((12, 1), (12, 2), (31, 3)):  # other ignored rows, then another shape
        *inputs, target = naive.make(n, 5, 13, seed=seed)
        outputs, expected = compiled(*inputs, target), case(*inputs, target)
        torch.testing.assert_close(tuple(outputs), tuple(expected))
        torch.testing.assert_close(naive.grads(outputs, inputs), naive.grads(expected, inputs))


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_hidden_from_a_frozen_and_a_trained_trunk():
    def step(x, trunk, w, t):
        return kernels.linear_cross_entropy(torch.tanh(x @ trunk), w, t)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    x, w, _, t = naive.make(10, 4, 9)
    for train_trunk in (True, False):
        trunk = torch.eye(4, dtype=torch.float64).requires_grad_(train_trunk)
        inputs = [i for i in (trunk, w) if i.requires_grad]
        ours = torch.autograd.grad(compiled(x.detach(), trunk, w, t), inputs)
        theirs = torch.autograd.grad(step(x.detach(), trunk, w, t), inputs)
        torch.testing.assert_close(ours, theirs)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_statistics_rewards_and_advantages():
    def rewards(h, w, t, cu):
        stats = kernels.linear_token_stats(h, w, t)
        margin = stats.max_logit - stats.target_logit
        by_token = [
            kernels.token_rewards(t, stats.argmax, cu),
            kernels.token_rewards(t, stats.rank, cu, divergence="rank", top_k=3),
            kernels.token_rewards(t, margin, cu, divergence="margin", max_margin=0.5),
        ]
        return [
            *stats,
            *(x for pair in by_token for x in pair),
            *kernels.gae(by_token[0].rewards, stats.logprobs, cu),
        ]

    hidden, weight, _, target = naive.make(9, 5, 13, bias=False, ignored=0)
    compiled = torch.compile(rewards, fullgraph=True, backend="aot_eager")
    args = (hidden, weight, target, CU)
    torch.testing.assert_close(compiled(*args), rewards(*args))


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_bad_target_still_names_the_row():
    def loss(h, w, t):
        return kernels.linear_cross_entropy(h, w, t)

    hidden, weight, _, target = naive.make(9, 5, 13, bias=False)
    target[4] = 13
    with pytest.raises(ValueError, match=r"target\[4\] is 13"):
        torch.compile(loss, fullgraph=True, backend="aot_eager")(hidden, weight, target)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_under_autocast_and_with_a_changing_coefficient():
    def loss(h, w, t, kl):
        rows = torch.linspace(-3, -1, 9)
        return kernels.linear_ppo_loss(h, w, t, rows, rows + 2, ref_logprobs=rows, kl_coef=kl).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    hidden, weight, _, target = naive.make(9, 5, 13, bias=False, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for kl in (0.1, 0.2, 0.3):
            ours, theirs = (f(hidden.bfloat16(), weight, target, kl) for f in (compiled, loss))
            torch.testing.assert_close(ours, theirs)


def _scheduled(hidden, weight, target, s):
    """Every numeric option of every operation follows a schedule whose step is used elsewhere."""
    rows = torch.linspace(-4, -3, 9)
    head = {"temperature": 2 * s, "softcap": 30 * s}
    smoothed = {"z_loss": 0.01 * s, "label_smoothing": 0.1 * s}
    ppo = {"kl_coef": 0.1 * s, "entropy_coef": 0.01 * s, "clip_low": 0.2 * s, "clip_high": 0.3 * s}
    loss, metrics = kernels.linear_ppo_loss(
        *(hidden, weight, target, rows, rows + 4),
        **{"ref_logprobs": rows, "normalizer": 9 * s, "max_log_ratio": 2 * s, **ppo, **head},
    )
    advantages = kernels.gae(rows, rows, CU, gamma=0.5 * s, lam=0.4 * s)
    rewards = kernels.token_rewards(
        *(target, rows, CU),
        **{"divergence": "margin", "max_margin": s, "positive": 2 * s, "negative": 3 * s},
        match=0.1 * s,
    )
    outputs = (
        kernels.linear_cross_entropy(hidden, weight, target, **head, **smoothed),
        *kernels.linear_logprobs(hidden, weight, target, **head, skip_mass=1e-3 * s),
        *kernels.linear_token_stats(hidden, weight, target, **head),
        *(loss, *metrics, *advantages, *rewards),
    )
    return [output * s for output in outputs]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("backend", "kind"),
    [("aot_eager", float), ("aot_eager", torch.tensor), ("inductor", float)],
)
def test_compiled_with_options_that_follow_a_schedule(backend, kind):
    if backend == "inductor" and shutil.which("c++") is None:
        pytest.skip("no C++ compiler for Inductor")
    compiled = torch.compile(_scheduled, fullgraph=True, backend=backend)
    hidden, weight, _, target = naive.make(9, 5, 13, bias=False, dtype=torch.float32)
    inputs = (hidden, weight, target)
    torch._dynamo.utils.counters.clear()
    for step in range(12):  # beyond the limit of recompilations, which is eight
        s = kind(0.5 + 0.07 * step)
        ours, theirs = compiled(*inputs, s), _scheduled(*inputs, s)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2  # constant, then symbolic


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_option_out_of_range():
    def loss(h, w, t, s):
        return kernels.linear_cross_entropy(h, w, t, temperature=2 * s) * s

    hidden, weight, _, target = naive.make(9, 5, 13, bias=False)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    compiled(hidden, weight, target, torch.tensor(1.0))
    with pytest.raises(ValueError, match="temperature must be a number in"):
        compiled(hidden, weight, target, torch.tensor(0.0))


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_with_a_process_group():
    """A group of one rank; test_shards.py has the arithmetic of two."""
    hidden, weight, _, target = naive.make(9, 5, 13, bias=False)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        group = dist.new_group([0])

        def loss(h, w):
            return kernels.linear_cross_entropy(h, w, target, process_group=group)

        ours = torch.compile(loss, fullgraph=True, backend="aot_eager")(hidden, weight)
        theirs = kernels.linear_cross_entropy(hidden, weight, target)
        torch.testing.assert_close(ours, theirs)
        inputs = (hidden, weight)
        torch.testing.assert_close(naive.grads([ours], inputs), naive.grads([theirs], inputs))
    finally:
        dist.destroy_process_group()


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_with_main_grad_leading_dimensions_and_ratios_of_sequences():
    hidden, weight, _, target = naive.make(12, 5, 13, bias=False)
    rows, cu = torch.linspace(-3, -1, 12, dtype=torch.float64).view(3, 4), torch.tensor([0, 5, 12])

    def loss(h, w, main_grad):
        return kernels.linear_ppo_loss(
            *(h.view(3, 4, 5), w, target.view(3, 4), rows, rows + 2),
            **{"ratio_level": "sequence", "cu_seqlens": cu, "row_weight": -rows},
            **{"dual_clip": 2.0, "with_entropy": False, "main_grad": main_grad},
        ).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ours, theirs = torch.zeros_like(weight), torch.zeros_like(weight)
    for function, buffer in ((compiled, ours), (loss, theirs)):
        function(hidden, weight, buffer).backward()
    assert theirs.any() and weight.grad is None
    torch.testing.assert_close(ours, theirs)
