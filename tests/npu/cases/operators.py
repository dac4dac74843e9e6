"""Every operator of the stand-in against torch on the CPU: run by ``tests/npu/test_standin.py`` on the stand-in."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch_npu
from standin_log import operators, recorded
from torch import Tensor

To = Callable[[Tensor], Tensor]
Case = Callable[[To], Any]

torch.manual_seed(0)
A, B = torch.randn(6, 8), torch.randn(6, 8)
P = torch.rand(6, 8) + 0.5
BITS = torch.randint(0, 8, (6, 8))
MASK = A > 0
ROWS = torch.tensor([3, 0, 3])
GRID = torch.rand(1, 3, 4, 2) * 2 - 1
WHOLE = torch.randint(0, 6, (6, 3))


def changed(tensor: Tensor, change: Callable[[Tensor], object]) -> Tensor:
    """Returns a changed copy, with a view of it changed in place."""
    copy = tensor.clone()
    change(copy)
    return copy


def set_rows(tensor: Tensor, value: Any) -> None:
    tensor[:, 1::3] = value


def unary(name: str, argument: Tensor) -> dict[str, Case]:
    cases: dict[str, Case] = {
        name: lambda to: getattr(torch, name)(to(argument)),
        f"{name} of a view": lambda to: getattr(torch, name)(to(argument).t()[1:5, ::2]),
    }
    if name not in WITHOUT_INPLACE:
        cases[f"{name}_"] = lambda to: changed(to(argument), lambda t: getattr(t[:, 2:5], f"{name}_")())
    return cases


EXACT: dict[str, Case] = {
    "there and back": lambda to: to(A).clone(),
    "views": lambda to: to(A).t()[1:5, ::2] * to(B).t()[1:5, ::2],
    "writing through a view": lambda to: changed(to(A), lambda t: set_rows(t, 7)),
    "assigning a tensor": lambda to: changed(to(A), lambda t: set_rows(t, to(B)[:, 1::3])),
    "cast": lambda to: [to(A).to(dtype) for dtype in (torch.bfloat16, torch.float16, torch.int32, torch.int64)],
    "zero": lambda to: changed(to(A), lambda t: t[2:4].zero_()),
    "ones": lambda to: torch.ones_like(to(A)),
    "fill": lambda to: changed(to(A), lambda t: t[:, 3].fill_(2.5)),
    "fill by a tensor": lambda to: changed(to(A), lambda t: t[:, 3].fill_(to(B)[0, 0])),
    "arange": lambda to: torch.arange(3, 17, 2, device=to(A).device),
    "repeat": lambda to: to(A).repeat(2, 3),
    "cat": lambda to: torch.cat([to(A), to(B)[:, :3]], 1),
    "stack": lambda to: torch.stack([to(A), to(B)], 1),
    "pad": lambda to: F.pad(to(A), (1, 2, 0, 3), value=1.5),
    "flip": lambda to: to(A).flip(0, 1),
    "triu": lambda to: [to(A).triu(1), to(A).tril(-1)],
    "triu_": lambda to: [changed(to(A), lambda t: t.triu_(1)), changed(to(A), lambda t: t.tril_(-1))],
    "add with a factor": lambda to: torch.add(to(A), to(B), alpha=3) + 2,
    "add_": lambda to: changed(to(A), lambda t: t[:3].add_(to(B)[3:], alpha=2).add_(1)),
    "subtract": lambda to: [torch.sub(to(A), to(B), alpha=3) - 2, 1 - to(A)],
    "sub_": lambda to: changed(to(A), lambda t: t.sub_(to(B), alpha=2).sub_(1)),
    "multiply": lambda to: to(A) * to(B) * 3,
    "mul_": lambda to: changed(to(A), lambda t: t.mul_(to(B)).mul_(3)),
    "divide": lambda to: to(A) / to(P) / 3,
    "div_": lambda to: changed(to(A), lambda t: t.div_(to(P)).div_(3)),
    "floor divide": lambda to: [to(BITS) // 3, to(BITS) // (to(BITS) + 1)],
    "remainder": lambda to: [to(BITS) % 3, to(BITS) % (to(BITS) + 1), torch.fmod(to(A), 0.5)],
    "minimum": lambda to: [torch.minimum(to(A), to(B)), torch.maximum(to(A), to(B))],
    "compare": lambda to: [getattr(to(A), op)(to(B)) for op in ("lt", "le", "gt", "ge", "eq", "ne")],
    "compare with a number": lambda to: [getattr(to(BITS), op)(3) for op in ("lt", "le", "gt", "ge", "eq", "ne")],
    "logical": lambda to: [getattr(to(MASK), f"logical_{op}")(to(MASK).flip(0)) for op in ("and", "or", "xor")],
    "logical not": lambda to: [to(MASK).logical_not(), changed(to(MASK), lambda t: t.logical_not_())],
    "bits": lambda to: [to(BITS) & to(BITS).flip(0), to(BITS) | to(BITS).flip(0), to(BITS) ^ to(BITS).flip(0)],
    "bits and numbers": lambda to: [
        to(BITS) & 3,
        to(BITS) | 4,
        ~to(BITS),
        changed(to(BITS), lambda t: t.bitwise_not_()),
    ],
    "where": lambda to: torch.where(to(MASK), to(A), to(B)),
    "clamp": lambda to: [
        to(A).clamp(-1, 1),
        to(A).clamp(min=0),
        to(A).clamp(max=0),
        torch.clamp_min(to(A), to(B)),
        to(A).clamp_min(0.1),
        to(A).clamp_max(0.1),
    ],
    "masked_fill": lambda to: [to(A).masked_fill(to(MASK), -1.5), to(A).masked_fill(to(MASK), to(B)[0, 0])],
    "equal": lambda to: torch.tensor([torch.equal(to(A), to(A)), torch.equal(to(A), to(B))]),
    "finite": lambda to: [
        getattr(torch, f"is{kind}")(to(torch.tensor([1.0, torch.inf, -torch.inf, torch.nan])))
        for kind in ("finite", "inf", "neginf", "posinf")
    ],
    "largest": lambda to: [to(A).max(), to(A).min(), to(A).amax(1), to(A).amin(0, keepdim=True)],
    "largest of a dimension": lambda to: [*to(A).max(1), *to(A).min(0)],
    "argmax": lambda to: [to(A).argmax(1), to(A).argmin(0, keepdim=True)],
    "any": lambda to: [to(MASK).any(1), to(MASK).all(0), to(MASK).any()],
    "sort": lambda to: [*to(A).sort(1, descending=True), *to(A).sort(0)],
    "topk": lambda to: [*to(A).topk(3, 1), *to(A).topk(2, 0, largest=False)],
    "index_select": lambda to: to(A).index_select(0, to(ROWS)),
    "embedding": lambda to: F.embedding(to(ROWS), to(A)),
    "index": lambda to: [to(A)[:, to(ROWS)], to(A)[to(ROWS), to(ROWS)]],
    "index_put": lambda to: changed(to(A), lambda t: t.__setitem__((to(ROWS)[:2], slice(1, 3)), to(B)[:2, :2])),
    "gather": lambda to: to(A).gather(1, to(WHOLE)),
    "scatter": lambda to: [
        to(A).scatter(1, to(WHOLE[:, :1]), to(B)[:, :1]),
        to(A).scatter(1, to(WHOLE[:, :1]), 2.0),
        changed(to(A), lambda t: t.scatter_(1, to(WHOLE[:, :1]), to(B)[:, :1])),
        changed(to(A), lambda t: t.scatter_(1, to(WHOLE[:, :1]), 2.0)),
    ],
    "index_copy": lambda to: changed(to(A), lambda t: t.index_copy_(0, to(ROWS)[:2], to(B)[:2])),
    "repeat_interleave": lambda to: [
        to(ROWS).repeat_interleave(2),
        to(A).repeat_interleave(2, 1),
        to(A).repeat_interleave(to(torch.tensor([2, 0, 1, 1, 3, 1])), 0),
        to(ROWS).repeat_interleave(to(torch.tensor([1, 0, 2]))),
    ],
    "nonzero": lambda to: to(MASK).nonzero(),
    "upsample": lambda to: F.interpolate(to(A)[None, None], scale_factor=2.0, mode="nearest"),
    "boolean index": lambda to: to(A)[to(MASK)],
}

WITHOUT_INPLACE = ("abs", "ceil", "erf", "expm1", "neg", "round", "sign", "trunc")
UNARY = (*WITHOUT_INPLACE, "cos", "exp", "floor", "relu", "sigmoid", "sin", "tanh")
CLOSE: dict[str, Case] = {
    **{name: case for function in UNARY for name, case in unary(function, A).items()},
    **{name: case for function in ("log", "reciprocal", "rsqrt", "sqrt") for name, case in unary(function, P).items()},
    "silu": lambda to: [F.silu(to(A)), F.mish(to(A)), F.gelu(to(A))],
    "power": lambda to: [to(P) ** 3, 2 ** to(A), to(P) ** to(A), changed(to(P), lambda t: t.pow_(2))],
    "lerp": lambda to: torch.lerp(to(A), to(B), 0.3),
    "addcmul": lambda to: torch.addcmul(to(A), to(B), to(P), value=0.5),
    "addcmul_": lambda to: changed(to(A), lambda t: t[2:4].addcmul_(to(B)[:2], to(P)[0], value=0.5)),
    "mean": lambda to: [to(A).mean(1), to(A).mean(), to(A).sum((0, 1)), to(A).sum(0, keepdim=True)],
    "norm": lambda to: torch.linalg.vector_norm(to(A), dim=1, keepdim=True),
    "cumsum": lambda to: to(A).cumsum(1),
    "softmax": lambda to: [to(A).softmax(1), to(A).log_softmax(0)],
    "grid_sample": lambda to: F.grid_sample(to(A)[None, None], to(GRID), align_corners=False),
    "group_norm": lambda to: F.group_norm(to(A).view(1, 6, 8), 3, to(P)[:, 0].contiguous(), to(B)[:, 0].contiguous()),
    "layer_norm": lambda to: [F.layer_norm(to(A), (8,), to(P)[0], to(B)[0]), F.layer_norm(to(A), (8,))],
    "convolution": lambda to: F.conv2d(
        to(A).view(1, 2, 4, 6), to(B).view(2, 2, 3, 4), to(P)[0, :2], padding=2, stride=2
    ),
    "linear": lambda to: F.linear(to(A), to(B), to(P)[:, 0].contiguous()),
    "matmul": lambda to: [to(A) @ to(B).t(), torch.mm(to(A), to(B).t()), to(A)[None] @ to(B).t()[None]],
    "bmm": lambda to: torch.bmm(to(A).view(2, 3, 8), to(B).view(2, 3, 8).transpose(1, 2)),
    "addmm": lambda to: torch.addmm(to(A)[:, :6], to(A), to(B).t(), beta=0.5, alpha=2),
    "baddbmm": lambda to: torch.baddbmm(
        to(A).view(2, 3, 8)[:, :, :3], to(A).view(2, 3, 8), to(B).view(2, 3, 8).mT, beta=0.5, alpha=2
    ),
}


def results(value: Any) -> list[Tensor]:
    return [part.cpu() for part in value] if isinstance(value, (list, tuple)) else [value.cpu()]


def compare(got: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("name", EXACT)
def test_exact(name: str) -> None:
    compare(results(EXACT[name](Tensor.npu)), results(EXACT[name](lambda tensor: tensor)), 0)


@pytest.mark.parametrize("name", CLOSE)
def test_close(name: str) -> None:
    compare(results(CLOSE[name](Tensor.npu)), results(CLOSE[name](lambda tensor: tensor)), 1e-5)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x.float(), (x.shape[-1],), weight.float(), eps).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fused(dtype: torch.dtype) -> None:
    x, y, weight, bias = (tensor.to(dtype) for tensor in (A, B, P[0], B[0]))
    to = Tensor.npu
    tolerance = 1e-6
    compare([torch_npu.npu_rms_norm(to(x), to(weight), 1e-5)[0].cpu()], [rms_norm(x, weight, 1e-5)], tolerance)
    normed, _, total = torch_npu.npu_add_rms_norm(to(x), to(y), to(weight), 1e-5)
    whole = x.float() + y.float()
    compare(results([normed, total]), [rms_norm(whole, weight, 1e-5).to(dtype), whole.to(dtype)], tolerance)
    gate, up = x.float().chunk(2, -1)
    compare(results([torch_npu.npu_swiglu(to(x))]), [(F.silu(gate) * up).to(dtype)], tolerance)
    normed, _, _, total = torch_npu.npu_add_layer_norm(to(x), to(y), to(weight), to(bias), 1e-5, True)
    expected = F.layer_norm(whole, (8,), weight.float(), bias.float(), 1e-5)
    compare(results([normed, total]), [expected.to(dtype), whole.to(dtype)], tolerance)
    for approximate in ("none", "tanh"):
        gelu = torch_npu.npu_gelu(to(x), approximate=approximate).cpu()
        compare(
            [gelu],
            [F.gelu(x.float(), approximate=approximate).to(dtype)],
            tolerance if dtype == torch.float32 else 1e-2,
        )
    gelu = torch_npu.npu_fast_gelu(to(x)).cpu()
    compare([gelu], [(x.float() * (1.702 * x.float()).sigmoid()).to(dtype)], tolerance)


def rotated(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    if interleaved:
        pairs = x.unflatten(-1, (-1, 2))
        turned = torch.stack([-pairs[..., 1], pairs[..., 0]], -1).flatten(-2)
    else:
        first, second = x.chunk(2, -1)
        turned = torch.cat([-second, first], -1)
    return x * cos + turned * sin


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary(interleaved: bool) -> None:
    x, other = torch.randn(2, 5, 4, 16), torch.randn(2, 5, 2, 16)  # batch, tokens, heads, head_dim
    cos, sin = torch.randn(2, 2, 5, 1, 16)
    mode = "interleave" if interleaved else "half"
    to = Tensor.npu
    expected = rotated(x, cos, sin, interleaved=interleaved)
    compare([torch_npu.npu_rotary_mul(to(x), to(cos), to(sin), mode).cpu()], [expected], 1e-6)
    query, keys = to(x), to(other)
    torch_npu.npu_apply_rotary_pos_emb(query, keys, to(cos), to(sin), layout="BSND", rotary_mode=mode)
    compare(results([query, keys]), [expected, rotated(other, cos, sin, interleaved=interleaved)], 1e-6)


@pytest.mark.parametrize("layout", ["BNSD", "BSND", "BSH"])
@pytest.mark.parametrize("masked", [False, True])
def test_attention(layout: str, masked: bool) -> None:
    query, keys, values = torch.randn(2, 4, 5, 16), *torch.randn(2, 2, 2, 9, 16)  # four heads share two
    mask = torch.rand(2, 1, 5, 9) > 0.3
    mask[..., 0] = True
    expected = F.scaled_dot_product_attention(
        query, keys, values, attn_mask=mask if masked else None, scale=0.2, enable_gqa=True
    )

    def laid_out(heads: Tensor) -> Tensor:
        tokens_first = heads.transpose(1, 2)
        return {"BNSD": heads, "BSND": tokens_first, "BSH": tokens_first.flatten(2)}[layout].contiguous().npu()

    hidden = ~mask.npu() if masked else None
    inputs = [laid_out(part) for part in (query, keys, values)]
    got = torch_npu.npu_fusion_attention(*inputs, 4, layout, atten_mask=hidden, scale=0.2)[0]
    compare([got.cpu()], [laid_out(expected).cpu()], 1e-5)
    options: dict[str, Any] = {"num_heads": 4, "num_key_value_heads": 2, "scale": 0.2, "input_layout": layout}
    got = torch_npu.npu_fused_infer_attention_score(*inputs, atten_mask=hidden, **options)[0]
    compare([got.cpu()], [laid_out(expected).cpu()], 1e-5)
    if not masked:
        lengths = [3, 9]
        visible = (torch.arange(9) < torch.tensor(lengths)[:, None])[:, None, None]
        expected = F.scaled_dot_product_attention(query, keys, values, attn_mask=visible, scale=0.2, enable_gqa=True)
        got = torch_npu.npu_fused_infer_attention_score(*inputs, actual_seq_lengths_kv=lengths, **options)[0]
        compare([got.cpu()], [laid_out(expected).cpu()], 1e-5)


def test_attention_of_several_sequences() -> None:
    queries, keys = [5, 3], [9, 3]  # the tokens of two sequences
    query, (key, value) = torch.randn(8, 4, 16), torch.randn(2, 12, 4, 16)  # tokens, heads, head_dim
    each = zip(query.split(queries), key.split(keys), value.split(keys), strict=True)
    expected = [
        F.scaled_dot_product_attention(*(part.transpose(0, 1)[None] for part in parts), scale=0.2)[0].transpose(0, 1)
        for parts in each
    ]
    ends = {"actual_seq_qlen": [5, 8], "actual_seq_kvlen": [9, 12]}
    got = torch_npu.npu_fusion_attention(query.npu(), key.npu(), value.npu(), 4, "TND", scale=0.2, **ends)[0]
    compare([got.cpu()], [torch.cat(expected)], 1e-5)


def test_group_norm_with_silu() -> None:
    x, (weight, bias) = torch.randn(1, 6, 3, 4), torch.randn(2, 6)
    got = torch_npu.npu_group_norm_silu(x.npu(), weight.npu(), bias.npu(), 3, 1e-6)[0]
    compare([got.cpu()], [F.silu(F.group_norm(x, 3, weight, bias, 1e-6))], 1e-5)


def test_causal_attention() -> None:
    query, keys, values = torch.randn(3, 2, 4, 7, 16)
    expected = F.scaled_dot_product_attention(query, keys, values, is_causal=True)
    got = F.scaled_dot_product_attention(query.npu(), keys.npu(), values.npu(), is_causal=True)
    compare([got.cpu()], [expected], 1e-5)
    triangle = torch.ones(2048, 2048, dtype=torch.bool).triu(1).npu()
    inputs = [part.npu() for part in (query, keys, values)]
    for mode in (2, 3):
        got = torch_npu.npu_fusion_attention(*inputs, 4, "BNSD", atten_mask=triangle, scale=0.25, sparse_mode=mode)[0]
        compare([got.cpu()], [expected], 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_quantized_products(dtype: torch.dtype) -> None:
    x, weight = torch.randn(5, 64, dtype=dtype), torch.randint(-127, 128, (7, 64), dtype=torch.int8)
    scale = torch.rand(7) / 100
    product = torch_npu.npu_weight_quant_batchmatmul(
        x.npu(), weight.npu().t(), antiquant_scale=scale.to(dtype).npu()
    ).cpu()
    expected = x.float() @ (weight.float() * scale.to(dtype).float()[:, None]).t()
    torch.testing.assert_close(product, expected.to(dtype), rtol=1e-2, atol=1e-2)
    values, scales = torch_npu.npu_dynamic_quant(x.npu())
    expected_scales = x.float().abs().amax(1) / 127
    torch.testing.assert_close(scales.cpu(), expected_scales)
    torch.testing.assert_close(values.cpu(), (x.float() / expected_scales[:, None]).round().to(torch.int8))
    bias = torch.randn(7, dtype=dtype)
    options = {"pertoken_scale": scales, "output_dtype": dtype}
    if dtype == torch.bfloat16:
        options["bias"] = bias.npu()
    product = torch_npu.npu_quant_matmul(values, weight.npu().t(), scale.npu(), **options).cpu()
    expected = (values.cpu().float() @ weight.float().t()) * expected_scales[:, None] * scale
    torch.testing.assert_close(product, (expected + bias.float() * ("bias" in options)).to(dtype), rtol=1e-2, atol=1e-2)


def test_cache_writes() -> None:
    cache, rows = torch.randn(3, 2, 10, 4), torch.randn(3, 2, 1, 4)  # slots, heads, positions, head_dim
    positions = torch.tensor([4, 0, 9])
    expected = cache.clone()
    expected[torch.arange(3), :, positions] = rows[:, :, 0]
    got = torch_npu.scatter_update_(cache.npu(), positions.npu(), rows.npu(), 2)
    compare([got.cpu()], [expected], 0)
    flat, where = cache.flatten(0, 1), torch.tensor([[0, 4], [3, 7]])
    expected = flat.clone()
    expected[where[:, 0], where[:, 1]] = rows[:2, 0, 0]
    got = flat.npu()
    torch_npu.npu_scatter_nd_update_(got, where.npu(), rows[:2, 0, 0].npu())
    compare([got.cpu()], [expected], 0)


def test_sampling() -> None:
    logits, p, k = torch.randn(3, 20), torch.tensor([0.5, 0.9, 1.0]), torch.tensor([20, 5, 1], dtype=torch.int32)
    kept = torch_npu.npu_top_k_top_p(logits.npu(), p.npu(), k.npu()).cpu()
    for row in range(3):
        ordered, order = logits[row].sort(descending=True)
        ordered[int(k[row]) :] = -torch.inf
        before = ordered.softmax(0).cumsum(0) - ordered.softmax(0)
        ids = set(order[(before < p[row]) & ordered.isfinite()].tolist())
        assert set(kept[row].isfinite().nonzero()[:, 0].tolist()) == ids


def test_random_numbers() -> None:
    torch.npu.manual_seed(3)
    first = [torch.rand(1000, device="npu").cpu(), torch.randn(1000, device="npu").cpu()]
    first.append(torch.empty(1000, device="npu").exponential_().cpu())
    first.append(torch.ones(4, 5, device="npu").multinomial(2).cpu())
    torch.npu.manual_seed(3)
    assert torch.equal(torch.rand(1000, device="npu").cpu(), first[0])
    assert abs(first[0].mean() - 0.5) < 0.05
    assert abs(first[1].mean()) < 0.15
    assert abs(first[1].std() - 1) < 0.1
    assert abs(first[2].mean() - 1) < 0.15


def test_random_numbers_of_a_captured_step() -> None:
    uniform, normal = torch.empty(2, 1000, device="npu")
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph, auto_dispatch_capture=True):
        uniform.uniform_()
        normal.normal_()
    replays = []
    for _ in range(2):
        graph.replay()
        replays.append(torch.stack([uniform, normal]).cpu())
    assert not torch.equal(*replays)  # each replay draws its own
    assert (replays[1].mean(1) - torch.tensor([0.5, 0.0])).abs().max() < 0.15


def test_every_operator_is_tested() -> None:
    """Runs after the others: what they launched, and what the sources implement."""
    sources = Path(__file__).parents[1] / "standin"
    text = "".join(file.read_text(encoding="utf-8") for file in sources.glob("*.cpp"))
    names = set(re.findall(r"^OP\((aclnn\w+)", text, re.MULTILINE))
    names |= {f"aclnn{name}" for name in re.findall(r"^(?:UNARY|BINARY|WITH_NUMBER)\((\w+)", text, re.MULTILINE)}
    names |= {f"aclnnInplace{name}" for name in re.findall(r"^INPLACE\((\w+)", text, re.MULTILINE)}
    untested = " ".join(sorted(names - LAUNCHED))
    if untested:
        pytest.fail(f"no test launches {untested}")


LAUNCHED: set[str] = set()


@pytest.fixture(autouse=True)
def launched_operators() -> Any:
    with recorded() as events:
        yield
    LAUNCHED.update(operators(events))
