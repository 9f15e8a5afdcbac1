"""What the plugin reads of a checkpoint before any layer exists, and under which names."""

import pytest
import torch

from pifa_vllm.checkpoint import Checkpoint, PIFAConfig
from pifa_vllm.errors import CheckpointError
from pifa_vllm.plugin.view import CheckpointView
from tests.edit import copy_edited


def make(model=None, ranks=None):
    view = CheckpointView(PIFAConfig(density=0.5, ranks=ranks or {}))
    if model is not None:
        view.find(str(model), None)
    return view


def test_a_local_checkpoint_is_checked_before_the_engine_starts(twins, tmp_path):
    assert "model.layers.0.self_attn.k_proj.weight" in make(twins.pifa).tensors

    name = "model.layers.1.mlp.up_proj"

    def out_of_range(tensors):
        tensors[f"{name}.pivot_rows"][-1] = 10_000

    spoilt = copy_edited(twins.pifa, tmp_path / "spoilt", tensors=out_of_range)
    with pytest.raises(CheckpointError, match=rf"model.safetensors: tensor {name}.pivot_rows: .*found 10000"):
        make(spoilt)


def test_dense_tensors_are_read_once_in_the_dtype_that_is_served(twins, tmp_path, monkeypatch):
    name = "model.norm.weight"
    large = copy_edited(twins.pifa, tmp_path / "large", tensors=lambda t: t[name].fill_(1e6))
    make(large).check_dense(torch.bfloat16)
    with pytest.raises(
        CheckpointError, match=rf"model.safetensors: tensor {name} as torch.float16: .*found 64 NaN"
    ):
        make(large).check_dense(torch.float16)

    view = make(twins.pifa)
    view.check_dense(torch.float32)
    monkeypatch.setattr(Checkpoint, "check_dense", lambda *_: pytest.fail("read again"))
    view.check_dense(torch.float32)


@pytest.mark.parametrize(("model", "on_hub"), [("", True), ("s3://bucket/model", True), ("a/b", False)])
def test_what_cannot_be_read_here_is_left_to_vllms_loader(model, on_hub):
    view = make()
    view.find(model or "a/b", None, on_hub=on_hub)
    view.model = model
    view.check_dense(torch.float32)


def test_a_model_on_a_hub_is_checked_while_loading_only():
    assert make("somebody/some-model").tensors is None


def test_it_is_downloaded_to_where_vllms_loader_looks_for_it(twins, monkeypatch):
    asked = {}

    def download(model, **options):
        asked.update(options, model=model)
        return str(twins.pifa)

    monkeypatch.setattr("pifa_vllm.plugin.view.snapshot_download", download)
    view = make()
    view.find("somebody/some-model", "main")
    view.downloads = "/there"
    assert view.checkpoint() is view.checkpoint()
    assert view.checkpoint().directory == twins.pifa
    expected = {"model": "somebody/some-model", "revision": "main", "cache_dir": "/there"}
    assert expected.items() <= asked.items()


def test_a_layer_may_be_several_modules():
    view = make(ranks={"x.q_proj": 3})
    packed = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}

    def names(prefix):
        return [(shard.name, shard.rank) for shard in view.shards(prefix, packed, has_bias=False)]

    assert names("x.qkv_proj") == [("x.q_proj", 3), ("x.k_proj", None), ("x.v_proj", None)]
    assert names("draft_model.x.qkv_proj") == names("x.qkv_proj")
    assert names("lm_head") == [("lm_head", None)]


def test_a_tensor_that_a_layer_lacks_is_named():
    view = make(ranks={"x.q_proj": 3})
    view.tensors = {f"x.q_proj.{suffix}" for suffix in ("pivot_weight", "coefficients", "pivot_rows")}
    view.shards("x.q_proj", {}, has_bias=False)
    with pytest.raises(CheckpointError, match=r"layer x.q_proj: tensor x.q_proj.bias is missing"):
        view.shards("x.q_proj", {}, has_bias=True)


def test_a_module_that_became_no_layer_is_named():
    view = make(ranks={"model.layers.0.q": 4, "model.h.9.q": 4})
    view.shards("model.layers.0.q", {}, has_bias=False)
    with pytest.raises(CheckpointError, match=r"1 modules .* first 'model.h.9.q'.* like 'model.layers.0.q'"):
        view.check_all_matched()


def test_pivot_rows_of_another_shape_than_the_layer_are_refused(twins):
    name = "model.layers.1.mlp.up_proj"
    view = make(twins.pifa, ranks={name: 1})
    rows = view.pivot_rows(name, view.checkpoint().modules[name].m)
    assert rows.dtype == torch.int32
    with pytest.raises(CheckpointError, match=rf"layer {name}: expected 7 outputs"):
        view.pivot_rows(name, 7)


def test_after_a_load_that_failed_there_is_no_other():
    view = make()
    with pytest.raises(CheckpointError, match="first"), view.loading():
        raise CheckpointError("first")
    with pytest.raises(CheckpointError, match=r"start another engine. It ended with: first"), view.loading():
        pytest.fail("it went on")
