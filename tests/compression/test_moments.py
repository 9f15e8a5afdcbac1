import pytest
import torch

from pifa_vllm.compression.moments import Moments


@pytest.mark.parametrize("features", [1, 5, 123, 384, 385, 800])
def test_moments_match_their_definition(features):
    dense = torch.randn(4, 30, features)
    compressed = dense + 0.1 * torch.randn(4, 30, features)
    moments = Moments(features, torch.device("cpu"))
    for part in range(4):
        moments.add(dense[part], compressed[part])
    x_o = dense.reshape(-1, features).double()
    x = compressed.reshape(-1, features).double()
    scale = float((x.T @ x).abs().max()) / 120
    assert moments.tokens == 120
    torch.testing.assert_close(moments.gram(), x.T @ x / 120, atol=1e-6 * scale, rtol=0)
    torch.testing.assert_close(moments.cross(), x_o.T @ x / 120, atol=1e-6 * scale, rtol=0)
    assert torch.equal(moments.gram(), moments.gram().T)


def test_dense_gram_ignores_the_compressed_inputs():
    dense = torch.randn(50, 6)
    moments = Moments(6, torch.device("cpu"), dense_gram=True)
    moments.add(dense, torch.full_like(dense, float("nan")))
    expected = dense.double().T @ dense.double() / 50
    torch.testing.assert_close(moments.gram(), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(moments.cross(), expected, atol=1e-6, rtol=0)


def test_drift_is_what_the_residual_stream_has_lost():
    x, lost = torch.randn(50, 6), torch.randn(50, 9)
    moments = Moments(6, torch.device("cpu"), stream=9)
    moments.add(x[:20], x[:20], lost[:20])
    moments.add(x[20:], x[20:], lost[20:])
    torch.testing.assert_close(moments.drift(), lost.double().T @ x.double() / 50, atol=1e-6, rtol=0)
    assert Moments(6, torch.device("cpu")).drift() is None


def test_folds_divide_the_batches_and_add_up_to_the_whole():
    # Of a size at which float32 sums in another order stay within the tolerance, whatever was drawn before.
    generator = torch.Generator().manual_seed(0)
    x, lost = torch.rand(3, 20, 6, generator=generator), torch.rand(3, 20, 9, generator=generator)
    whole = Moments(6, torch.device("cpu"), stream=9)
    halves = Moments(6, torch.device("cpu"), stream=9, folds=2)
    for part in range(3):
        for moments in (whole, halves):
            moments.add(x[part], 2 * x[part], lost[part])
    assert halves.tokens == 60
    for name in ("gram", "cross", "drift"):
        torch.testing.assert_close(getattr(halves, name)(), getattr(whole, name)(), atol=1e-6, rtol=0)
    torch.testing.assert_close(halves.cross(1), 2 * x[1].double().T @ x[1].double() / 20, atol=1e-6, rtol=0)
    expected = torch.cat([lost[0], lost[2]]).double().T @ (2 * torch.cat([x[0], x[2]])).double() / 40
    torch.testing.assert_close(halves.drift(0), expected, atol=1e-5, rtol=0)
