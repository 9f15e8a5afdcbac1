from pifa_vllm.compression.allocation import uniform
from pifa_vllm.compression.pipeline import Compression
from tests.compression.runs import Recorder, tiny_options
from tests.tiny import save_tiny_model


def test_disk_estimate_covers_what_a_run_leaves_on_the_disk(tmp_path, monkeypatch):
    """The peak of OUTPUT.partial, looked at after every layer, stays under the estimate and near it."""
    model = save_tiny_model(tmp_path / "m", layers=3)
    text = tmp_path / "text.txt"
    text.write_text("some words to calibrate on, again and again. " * 200)
    options = tiny_options(model, tmp_path / "out", text, samples=32)
    recorder = Recorder()
    run = Compression(options, recorder)
    expected = run.estimate()
    sizes = []
    monkeypatch.setattr(
        recorder,
        "module_done",
        lambda _: sizes.append(
            sum(p.stat().st_size for p in (tmp_path / "out.partial").rglob("*") if p.is_file())
        ),
    )
    run.run("test")
    assert 0.3 * expected.disk_bytes < max(sizes) <= expected.disk_bytes
    assert expected.tokens == 32 * 48
    assert expected.seconds > 0
    assert "estimate:" in expected.text()


def test_gradients_are_counted(tmp_path):
    model = save_tiny_model(tmp_path / "m")
    text = tmp_path / "text.txt"
    without, allocated, both = (
        Compression(tiny_options(model, tmp_path / "out", text, **choice), Recorder()).estimate()
        for choice in (
            {"allocation": "uniform", "metric": "inputs"},
            {"allocation": "sensitivity", "metric": "inputs"},
            {"allocation": "sensitivity", "metric": "outputs"},
        )
    )
    assert without.disk_bytes < allocated.disk_bytes < both.disk_bytes
    # Of gate and up, which are wider than their inputs, the diagonal.
    moments = 4 * (sum(m * m for m in (64, 32, 32, 64, 64)) + 2 * 112) * 2
    assert both.disk_bytes - allocated.disk_bytes == moments


def test_more_samples_need_more_of_everything(tmp_path):
    model = save_tiny_model(tmp_path / "m")
    text = tmp_path / "text.txt"
    small, large = (
        Compression(
            tiny_options(model, tmp_path / "out", text, samples=n, density=uniform(0.5)), Recorder()
        ).estimate()
        for n in (4, 4000)
    )
    assert large.mapped_bytes == 1000 * small.mapped_bytes
    assert large.disk_bytes > small.disk_bytes
    assert large.seconds > small.seconds
