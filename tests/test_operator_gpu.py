"""The compiled kernels on a GPU: what only a device can show. Accuracy is the business of test_operator.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from leet_linear_attention import DecodeState, linear_attention, linear_attention_step
from operator_cases import TOLERANCE, error

pytestmark = pytest.mark.gpu


def inputs(tokens: int, batch: int = 2, heads: int = 4, width: int = 64, per_token: bool = False) -> list[Tensor]:
    q, k, v = (torch.randn(batch, tokens, heads, width, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    shape = (batch, tokens, heads) if per_token else (heads,)
    return [q, k, v, -torch.rand(shape, device="cuda") * 0.2]


def gradients(x: list[Tensor]) -> tuple[Tensor, ...]:
    leaves = [t.detach().clone().requires_grad_() for t in x]
    o, state = linear_attention(*leaves, output_final_state=True)
    return (o, state, *torch.autograd.grad((o.float().square().sum() + state.sum()), leaves))


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory from torch.empty comes filled with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 2000])
def test_nothing_unwritten_is_read_and_runs_repeat(poisoned: None, tokens: int, per_token: bool) -> None:
    x = inputs(tokens, per_token=per_token)
    first, second = gradients(x), gradients(x)
    for a, b in zip(first, second, strict=True):
        assert a.isfinite().all()
        assert torch.equal(a, b)


def test_no_synchronisation() -> None:
    x = inputs(300, per_token=True)
    bounds = torch.tensor([0, 100, 300], device="cuda", dtype=torch.int32)
    state = DecodeState.allocate(2, 4, 64, 64, dtype=torch.bfloat16, device="cuda")
    one = inputs(1)
    gradients(x)
    linear_attention_step(*one, state)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(x)
        linear_attention(*(t[:1] for t in x), cu_seqlens=bounds, output_final_state=True)
        linear_attention_step(*one, state)
        state.rewind(1)
        state.fold()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_graph_replay_with_changed_inputs() -> None:
    x = inputs(500)
    for _ in range(2):
        linear_attention(*x, output_final_state=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, state = linear_attention(*x, output_final_state=True)
    for t in x[:3]:
        t.normal_()
    graph.replay()
    wanted, wanted_state = linear_attention(*x, output_final_state=True)
    assert torch.equal(o, wanted) and state is not None and torch.equal(state, wanted_state)


def test_graph_of_the_step_folds_by_itself() -> None:
    sequence = inputs(100)
    current = [t[:, :1].clone() for t in sequence[:3]] + [sequence[3]]
    state = DecodeState.allocate(2, 4, 64, 64, dtype=torch.bfloat16, device="cuda")
    linear_attention_step(*current, state)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = linear_attention_step(*current, state)
    state.reset()
    outputs = []
    for i in range(100):
        for t, whole in zip(current[:3], sequence[:3], strict=True):
            t.copy_(whole[:, i : i + 1])
        graph.replay()
        outputs.append(o.clone())
    wanted, final = linear_attention(*sequence, output_final_state=True)
    assert final is not None
    error = (torch.cat(outputs, 1).float() - wanted.float()).norm() / wanted.float().norm()
    assert error < 6e-3
    assert (state.fold() - final).norm() / final.norm() < 5e-3


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_passes_of_the_gradient_side_by_side(heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches that begin before the one in front has ended give bit for bit what they give one after another."""
    from leet_linear_attention.triton.launch import Sweep

    x = inputs(1000, heads=heads[0])
    x[1], x[2] = (t[:, :, : heads[1]].contiguous() for t in x[1:3])
    leaves = [t.detach().clone().requires_grad_() for t in x]
    leaves[3].requires_grad_(False)
    run, seen = Sweep.run, []

    def gradients() -> tuple[Tensor, ...]:
        o = linear_attention(*leaves)[0]
        return torch.autograd.grad(o.float().square().sum(), leaves[:3])

    def alone(self: Sweep, *args: object, beside: bool = False, **kwargs: object) -> object:
        seen.append(beside)
        torch.cuda.synchronize()
        return run(self, *args, **kwargs)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Sweep, "run", alone)
        wanted = gradients()
    # the forward, and the three gradients; sums of heads go between
    assert seen == [False, False, True, True] if heads[0] == heads[1] else [False] * 4
    for _ in range(50):
        got = gradients()
        noise = [torch.full_like(x[0], float("nan")) for _ in range(3)]  # in the memory that comes free between
        del noise
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("per_token", [False, True])
def test_compiled_forward_and_backward(per_token: bool) -> None:
    torch._dynamo.reset()

    def loss(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        o, state = linear_attention(q * 1.5, k, v, g, output_final_state=True)
        assert state is not None
        return o.float().square().mean() + state.mean()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for tokens in (100, 257):
        leaves = [t.requires_grad_() for t in inputs(tokens, per_token=per_token)]
        got = torch.autograd.grad(compiled(*leaves), leaves)
        wanted = torch.autograd.grad(loss(*leaves), leaves)
        for a, b in zip(got, wanted, strict=True):
            assert (a - b).norm() <= 1e-2 * b.norm()


@pytest.mark.parametrize("width", [32, 256])
def test_other_shapes_do_not_compile_again(width: int) -> None:
    """A compiled variant depends on widths, dtype, kind of log_decay and what is asked for; on no length or count."""
    from leet_linear_attention.triton.step import step_kernel
    from leet_linear_attention.triton.sweep import scan_kernel, sweep_kernel
    from leet_linear_attention.triton.wide import scores_kernel, wide_kernel

    def compiled() -> int:
        kernels = (sweep_kernel, scan_kernel, scores_kernel, wide_kernel, step_kernel)
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    def use(tokens: int, batch: int, heads: int) -> None:
        x = inputs(tokens, batch, heads, width)
        leaves = [t.requires_grad_() for t in x[:3]]
        torch.autograd.grad(linear_attention(*leaves, x[3])[0].float().sum(), leaves)
        state = DecodeState.allocate(batch, heads, width, width, dtype=torch.bfloat16, device="cuda")
        linear_attention_step(*(t[:, :1].detach() for t in x[:3]), x[3], state)

    use(64, 1, 4)
    use(20_000, 1, 1)  # long and few heads: in segments
    before = compiled()
    for shape in ((1, 1, 1), (17, 3, 2), (64, 2, 3), (1000, 1, 16), (4096, 5, 7), (30_011, 1, 1), (16_384, 1, 2)):
        use(*shape)
    assert compiled() == before


@pytest.mark.parametrize(("per_token", "width"), [(False, 64), (True, 64), (False, 256)])
def test_a_row_gives_the_same_whatever_else_is_in_the_batch(per_token: bool, width: int) -> None:
    """Bitwise: with batch_invariant also where a few rows alone would be cut into segments."""
    x = inputs(5000, batch=9, heads=2, width=width, per_token=per_token)

    def results(rows: slice, **options: bool) -> list[Tensor]:
        q, k, v, g = x
        leaves = [t[rows].clone().requires_grad_() for t in (q, k, v)]
        g = (g[rows] if per_token else g).clone().requires_grad_(per_token)
        o, state = linear_attention(*leaves, g, output_final_state=True, **options)
        assert state is not None
        wanted = [*leaves, g] if per_token else leaves
        return [o, state, *torch.autograd.grad(o.float().square().sum() + state.sum(), wanted)]

    for together, alone in zip(
        results(slice(0, 9), batch_invariant=True), results(slice(4, 5), batch_invariant=True), strict=True
    ):
        assert torch.equal(together[4:5], alone)
    for cut, whole in zip(results(slice(4, 5)), results(slice(4, 5), batch_invariant=True), strict=True):
        assert (cut.float() - whole.float()).norm() <= 1e-2 * whole.float().norm()


def test_offsets_beyond_2_to_the_31() -> None:
    tokens, heads, width = 1_100_000, 16, 128  # 2.25e9 elements a tensor
    if torch.cuda.get_device_properties(0).total_memory < 40e9:
        pytest.skip("needs 40 GB of GPU memory")
    q, k, v = (torch.empty(1, tokens, heads, width, device="cuda", dtype=torch.bfloat16).normal_() for _ in range(3))
    g = -torch.rand(heads, device="cuda") * 0.1 - 0.01
    o, final = linear_attention(q, k, v, g, output_final_state=True)
    tail = slice(tokens - 4000, tokens)  # what came before has decayed away: exp(-0.01 * 4000)
    wanted, wanted_final = linear_attention(q[:, tail], k[:, tail], v[:, tail], g, output_final_state=True)
    assert final is not None and wanted_final is not None
    last = slice(-1000, None)
    assert (o[:, last].float() - wanted[:, last].float()).norm() <= 5e-3 * wanted[:, last].float().norm()
    assert (final - wanted_final).norm() <= 5e-3 * wanted_final.norm()


@pytest.mark.parametrize(("key_dim", "value_dim"), [(256, 512), (512, 256), (320, 48)])
def test_wide_heads(key_dim: int, value_dim: int) -> None:
    q, k = (torch.randn(2, 200, 2, key_dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    v = torch.randn(2, 200, 2, value_dim, device="cuda", dtype=torch.bfloat16)
    g = -torch.rand(2, 200, 2, device="cuda") * 0.2
    results = []
    for method in ("triton", "torch"):
        leaves = [t.clone().requires_grad_() for t in (q, k, v, g)]
        o, state = linear_attention(*leaves, scale=key_dim**-0.5, output_final_state=True, method=method)
        assert state is not None
        results.append((o, state, *torch.autograd.grad(o.float().square().sum() + state.sum(), leaves)))
    for a, b in zip(*results, strict=True):
        assert (a.float() - b.float()).norm() <= 1.5e-2 * b.float().norm()


WIDTHS = [(256, 512), (512, 256), (320, 48), (136, 264)]


def wide_results(
    key_dim: int, value_dim: int, tokens: int, decay: float | None, method: str, **more: bool
) -> list[Tensor]:
    """Outputs and gradients with a decay that needs none: every pass by the form for 256 rows of the state.

    The method "torch" is given the same numbers in float64.
    """
    random = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, device="cuda", generator=random).to(dtype)

    q, k, v = normal(2, tokens, 2, key_dim), normal(2, tokens, 1, key_dim), normal(2, tokens, 2, value_dim)
    initial, dfinal = (normal(2, 2, key_dim, value_dim, dtype=torch.float32) for _ in range(2))
    do = normal(2, tokens, 2, value_dim)
    g = None if decay is None else torch.tensor([decay, decay / 50], device="cuda")
    if method == "torch":
        q, k, v, initial, dfinal, do = (x.double() for x in (q, k, v, initial, dfinal, do))
        g = None if g is None else g.double()
    leaves = [t.requires_grad_() for t in (q, k, v, initial)]
    o, state = linear_attention(
        q, k, v, g, initial_state=initial, scale=key_dim**-0.5, output_final_state=True, method=method, **more
    )
    assert state is not None
    return [o, state, *torch.autograd.grad((o, state), leaves, (do, dfinal))]


@pytest.mark.parametrize("tokens", [1, 31, 33, 200, 4100])  # the last in segments
@pytest.mark.parametrize(("key_dim", "value_dim"), WIDTHS)
@pytest.mark.parametrize("decay", [None, -0.1, -30.0])
def test_wide_heads_whose_decay_is_fixed(key_dim: int, value_dim: int, tokens: int, decay: float | None) -> None:
    found = wide_results(key_dim, value_dim, tokens, decay, "triton")
    whole = wide_results(key_dim, value_dim, tokens, decay, "triton", batch_invariant=True)
    wanted = wide_results(key_dim, value_dim, tokens, decay, "torch")
    for a, uncut, b in zip(found, whole, wanted, strict=True):
        assert error(a, b) <= TOLERANCE[torch.bfloat16]
        assert error(uncut, b) <= TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("tokens", [1, 33, 4100])
@pytest.mark.parametrize(("key_dim", "value_dim"), WIDTHS)
def test_wide_heads_read_nothing_unwritten_and_repeat(
    poisoned: None, key_dim: int, value_dim: int, tokens: int
) -> None:
    first, second = (wide_results(key_dim, value_dim, tokens, -30.0, "triton") for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert a.isfinite().all()
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [128, 256])
@pytest.mark.parametrize("buffer", [64, 128, 256])
def test_wide_windows(buffer: int, width: int, dtype: torch.dtype) -> None:
    """Steps with room to take many tokens back, of one token to all that fit, by Triton and by torch."""
    outputs = []
    for method in ("triton", "torch"):
        torch.manual_seed(0)
        state = DecodeState.allocate(1, 2, width, width, buffer, dtype, "cuda", keep=buffer)
        for tokens in (1, 5, buffer, 1, 30, 1):
            x = [torch.randn(1, tokens, 2, width, device="cuda", dtype=dtype) for _ in range(3)]
            g = -torch.rand(2, device="cuda") * 0.1
            o = linear_attention_step(*x, g, state, scale=width**-0.5, method=method)
        state.rewind(20)
        outputs.append((o, state.fold()))
    limit = 1e-5 if dtype == torch.float32 else 6e-3
    for a, b in zip(*outputs, strict=True):
        assert (a.float() - b.float()).norm() <= limit * b.float().norm()
