import pytest
from safetensors.torch import load_file, save_file

from pifa_vllm.compression.decoder import DenseModel
from pifa_vllm.compression.journal import Journal, lock, model_fingerprint
from pifa_vllm.compression.report.schema import LayerReport
from pifa_vllm.errors import PifaError
from tests.tiny import save_tiny_model


def test_a_saved_journal_comes_back(tmp_path):
    path = tmp_path / "journal.json"
    assert Journal.load(path, {"a": 1}) is None
    journal = Journal(inputs={"a": 1, "b": [1, 2]})
    journal.layers.append(LayerReport(layer=0, flow_error=0.5, seconds=1.0))
    journal.save(path)
    assert Journal.load(path, {"b": [1, 2], "a": 1}) == journal
    assert sorted(p.name for p in tmp_path.iterdir()) == ["journal.json"]


def test_other_inputs_are_named(tmp_path):
    path = tmp_path / "journal.json"
    Journal(inputs={"a": 1, "same": 2, "gone": 3}).save(path)
    with pytest.raises(PifaError, match=r"a: there 1, now 5; gone: there 3, now null\)"):
        Journal.load(path, {"a": 5, "same": 2})


@pytest.mark.parametrize("text", ["", "{", '{"inputs": 3}', '{"inputs": {}, "surprise": 1}'])
def test_a_damaged_journal_is_an_error(tmp_path, text):
    path = tmp_path / "journal.json"
    path.write_text(text)
    with pytest.raises(PifaError, match=r"journal\.json: the journal .* cannot be read") as caught:
        Journal.load(path, {})
    assert "\n" not in str(caught.value)


def test_fingerprint_sees_config_shapes_and_values(tmp_path):
    first = model_fingerprint(DenseModel(save_tiny_model(tmp_path / "a")))
    assert first == model_fingerprint(DenseModel(save_tiny_model(tmp_path / "b")))
    assert first != model_fingerprint(DenseModel(save_tiny_model(tmp_path / "c", seed=1)))
    assert first != model_fingerprint(DenseModel(save_tiny_model(tmp_path / "d", rms_norm_eps=1e-3)))
    path = tmp_path / "b" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1.01
    save_file(tensors, path, metadata={"format": "pt"})
    assert first != model_fingerprint(DenseModel(tmp_path / "b"))


def test_lock_is_exclusive_and_released(tmp_path):
    with lock(tmp_path), pytest.raises(PifaError, match="another process"):
        lock(tmp_path)
    lock(tmp_path).close()
