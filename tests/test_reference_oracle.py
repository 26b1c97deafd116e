"""The oracle itself, against finite differences, torch's autograd and published test vectors."""

import numpy as np
import pytest
import reference
from cases import BY_NAME, CASES, make
from reference import Options

SMALL = [case for case in CASES if case.name not in ("long", "head_dim_256")]


def loss_of(problem, dout, dlse, **changed):
    x = {"q": problem.q, "k": problem.k, "v": problem.v, **problem.tensors, **changed}
    q, k, v = x.pop("q"), x.pop("k"), x.pop("v")
    out, lse = reference.attention(q, k, v, Options(**problem.case.words, **x))
    return (out * dout).sum() + (np.where(np.isinf(lse), 0, lse) * dlse).sum()


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradients_are_finite_differences(case, rng):
    problem = make(case, "float64", rng)
    dout = rng.standard_normal((*problem.q.shape[:3], problem.v.shape[3]))
    dlse = rng.standard_normal(problem.q.shape[:3])
    grads = reference.attention_backward(dout, problem.q, problem.k, problem.v, problem.options, dlse)
    inputs = {"q": problem.q, "k": problem.k, "v": problem.v, **problem.tensors}
    for name in ("q", "k", "v", "bias", "sinks"):
        if name not in inputs:
            continue
        direction = rng.standard_normal(inputs[name].shape)
        step = 1e-5
        ahead = loss_of(problem, dout, dlse, **{name: inputs[name] + step * direction})
        behind = loss_of(problem, dout, dlse, **{name: inputs[name] - step * direction})
        expected = (ahead - behind) / (2 * step)
        assert (grads[f"d{name}"] * direction).sum() == pytest.approx(expected, rel=1e-6, abs=1e-6), name


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("with_mask", [False, True])
def test_agrees_with_torch(causal, with_mask, rng):
    torch = pytest.importorskip("torch")
    problem = make(BY_NAME["gqa"], "float64", rng)
    mask = rng.random((2, 6, 19, 19)) < 0.8
    mask[..., 0] = True
    seen = mask & np.tri(19, dtype=bool) if causal else mask
    q, k, v = (torch.from_numpy(x).requires_grad_() for x in (problem.q, problem.k, problem.v))
    repeated = [x.repeat_interleave(3, dim=1) for x in (k, v)]
    given = {"attn_mask": torch.from_numpy(seen)} if with_mask else {"is_causal": causal}
    expected = torch.nn.functional.scaled_dot_product_attention(q, *repeated, **given)
    dout = rng.standard_normal(expected.shape)
    expected.backward(torch.from_numpy(dout))
    options = Options(causal=causal, mask=mask if with_mask else None)
    out, _ = reference.attention(problem.q, problem.k, problem.v, options)
    np.testing.assert_allclose(out, expected.detach().numpy(), rtol=1e-12, atol=1e-12)
    grads = reference.attention_backward(dout, problem.q, problem.k, problem.v, options)
    for name, x in (("dq", q), ("dk", k), ("dv", v)):
        np.testing.assert_allclose(grads[name], x.grad.numpy(), rtol=1e-11, atol=1e-11)


def test_every_term_of_the_score_agrees_with_torch(rng):
    """Softcap, ALiBi, bias, mask, sink and dropout, written again with torch's operations and its autograd."""
    torch = pytest.importorskip("torch")
    problem = make(BY_NAME["everything"], "float64", rng)
    t = {name: torch.from_numpy(np.array(x)) for name, x in problem.tensors.items()}
    t["bias"].requires_grad_()
    t["sinks"].requires_grad_()
    q, k, v = (torch.from_numpy(x).requires_grad_() for x in (problem.q, problem.k, problem.v))
    rows, columns = q.shape[2], k.shape[2]
    distance = torch.arange(rows)[:, None] + (columns - rows) - torch.arange(columns)
    score = 4.0 * torch.tanh(torch.einsum("bhid,bhjd->bhij", q, k.repeat_interleave(2, 1)) * 0.4 / 4.0)
    score = score - t["alibi_slopes"][:, None, None] * distance.abs() + t["bias"]
    score = score.masked_fill((distance < 0) | (distance > 15) | ~t["mask"], -torch.inf)
    sink = t["sinks"].reshape(1, -1, 1, 1).expand(*score.shape[:3], 1)
    logits = torch.cat([score, sink], dim=3)
    factor = np.stack([reference.dropout_factor(b, 4, rows, columns, 0.2, 3) for b in range(2)])
    weights = logits.softmax(3)[..., :-1] * torch.from_numpy(factor)
    expected = weights @ v.repeat_interleave(2, 1)
    lse = logits.logsumexp(3)
    dout, dlse = rng.standard_normal(expected.shape), rng.standard_normal(lse.shape)
    torch.autograd.backward([expected, lse], [torch.from_numpy(dout), torch.from_numpy(dlse)])

    out, oracle_lse = reference.attention(problem.q, problem.k, problem.v, problem.options)
    grads = reference.attention_backward(dout, problem.q, problem.k, problem.v, problem.options, dlse)
    np.testing.assert_allclose(out, expected.detach().numpy(), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(oracle_lse, lse.detach().numpy(), rtol=1e-12, atol=1e-12)
    for name, x in (("dq", q), ("dk", k), ("dv", v), ("dbias", t["bias"]), ("dsinks", t["sinks"])):
        np.testing.assert_allclose(grads[name], x.grad.numpy(), rtol=1e-10, atol=1e-10, err_msg=name)


@pytest.mark.parametrize(
    ("counter", "seed", "words"),
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0_A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_words(counter, seed, words):
    """The known answers that the authors of Philox publish with it."""
    assert tuple(int(w) for w in reference.philox4x32(counter, seed)) == words


def test_dropout_drops_the_asked_share():
    factor = reference.dropout_factor(1, 4, 100, 100, 0.3, seed=5)
    dropped = (factor == 0).mean()
    assert abs(dropped - 0.3) < 5 * (0.3 * 0.7 / factor.size) ** 0.5
    np.testing.assert_array_equal(factor[factor != 0], 1 / 0.7)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_depends_on_the_distance_only(interleaved, rng):
    """q·k after rotation is the same wherever the pair stands: what rotary embedding is for."""
    angles = np.outer(np.arange(64), 10000.0 ** (-np.arange(4) / 4))
    q, k = rng.standard_normal((2, 1, 1, 10))

    def product(i, j):
        a = reference.rotate(q, [i], np.cos(angles), np.sin(angles), interleaved)
        b = reference.rotate(k, [j], np.cos(angles), np.sin(angles), interleaved)
        return (a * b).sum()

    assert product(9, 4) == pytest.approx(product(45, 40), rel=1e-12)
    assert product(9, 4) != pytest.approx(product(9, 5), rel=1e-3)


def test_varlen_is_each_sequence_alone(rng):
    q, k, v = rng.standard_normal((3, 12, 2, 8))
    cu_q, cu_k = [0, 5, 5, 12], [0, 3, 9, 12]
    out, lse = reference.attention_varlen(q, k, v, cu_q, cu_k, Options(causal="bottom_right"))
    for b in range(3):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        alone = [x.transpose(1, 0, 2)[None] for x in (q[rows], k[keys], v[keys])]
        expected, expected_lse = reference.attention(*alone, Options(causal="bottom_right"))
        np.testing.assert_array_equal(out[rows], expected[0].transpose(1, 0, 2))
        np.testing.assert_array_equal(lse[:, rows], expected_lse[0])


def test_merge_is_the_whole(rng):
    q, k, v = rng.standard_normal((3, 2, 2, 9, 8))
    parts = [reference.attention(q, k[:, :, cut], v[:, :, cut]) for cut in (slice(0, 4), slice(4, 9))]
    out, lse = reference.merge_states(*parts[0], *parts[1])
    expected, expected_lse = reference.attention(q, k, v)
    np.testing.assert_allclose(out, expected, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-12)
