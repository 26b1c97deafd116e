"""torch's own samples of scaled_dot_product_attention, which come with torch, given to flashcore's."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("expecttest")  # torch.testing._internal needs it

import flashcore.torch as fct  # noqa: E402
from torch.nn.functional import scaled_dot_product_attention as torchs  # noqa: E402
from torch.testing._internal.common_methods_invocations import op_db  # noqa: E402

(INFO,) = [info for info in op_db if info.name == "nn.functional.scaled_dot_product_attention"]


def results(function, sample, dtype, place):
    """out and the gradients of all tensors that have one, as if the sample had this dtype.

    The numbers of samples reach ±9, where a weight is one or nothing and gradients are all rounding: a quarter of them.
    """

    def placed(x):
        if not isinstance(x, torch.Tensor):
            return x
        x = x.detach().to(place)
        return (x / 4).to(dtype).requires_grad_() if x.is_floating_point() else x

    tensors = [placed(x) for x in (sample.input, *sample.args)]
    words = {name: placed(word) for name, word in sample.kwargs.items()}
    out = function(*tensors, **words)
    wanted = [x for x in (*tensors, *words.values()) if isinstance(x, torch.Tensor) and x.requires_grad]
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=place).reshape(out.shape).to(dtype)
    return [out, *torch.autograd.grad(out, wanted, weights)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_errors_are_at_most_twice_torchs(dtype, device):
    """Against float64, plus a few roundings of the largest number, for each result of each sample.

    The largest among all results of the call: gradients of q and k are differences of such.
    """
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("this torch sees no GPU")
    samples = [s for s in INFO.sample_inputs("cpu", dtype) if not s.kwargs.get("dropout_p")]
    assert len(samples) > 10
    for sample in samples:
        truth = results(torchs, sample, torch.float64, device)
        theirs, ours = (results(f, sample, dtype, device) for f in (torchs, fct.scaled_dot_product_attention))
        roundings = 4 * torch.finfo(dtype).eps * max(exact.abs().max() for exact in truth)
        for mine, his, exact in zip(ours, theirs, truth, strict=True):
            assert mine.dtype == his.dtype and mine.shape == his.shape
            assert (mine - exact).abs().max() <= 2 * (his - exact).abs().max() + roundings, sample


def test_dropout_of_the_samples_has_its_shape_and_dtype():
    samples = [s for s in INFO.sample_inputs("cpu", torch.float32) if s.kwargs.get("dropout_p")]
    assert samples
    for sample in samples:
        out = fct.scaled_dot_product_attention(sample.input, *sample.args, **sample.kwargs)
        assert out.shape == torchs(sample.input, *sample.args, **sample.kwargs).shape
        assert out.dtype == torch.float32 and out.isfinite().all()
