"""Adapters and weights that are changed over HTTP while the server and its two ranks run."""

import httpx
import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.edit import copy_edited
from tests.plugin.reference import answers_of, make_prompts
from tests.plugin.test_lora import ALL, save_adapter
from tests.release import vllm_before
from tests.server.serving import serve
from tests.tiny import save_tiny_model

pytest.importorskip("vllm")

pytestmark = pytest.mark.vllm

TOKENS = 8
(PROMPT,) = make_prompts([20])


@pytest.fixture(scope="module")
def server(llamas, tmp_path_factory):
    with serve(
        llamas / "first-pifa",
        tmp_path_factory.mktemp("log") / "server.log",
        *("--max-model-len", "256", "--enable-lora", "--max-lora-rank", "8", "--server.admin-routes"),
        *("--tensor-parallel-size", "2"),
        VLLM_ALLOW_RUNTIME_LORA_UPDATING="1",
        VLLM_SERVER_DEV_MODE="1",
    ) as running:
        yield running


def post(server, path, **body):
    return httpx.post(f"{server.url}{path}", json=body, timeout=300)


def ask(server, model="tiny"):
    request = {"model": model, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    response = post(server, "/v1/completions", **request, return_token_ids=True)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["token_ids"]


def says(directory, adapter=None):
    model = AutoModelForCausalLM.from_pretrained(directory)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    (answer,) = answers_of(model.eval(), [PROMPT], TOKENS)
    assert answer.certain == TOKENS
    return answer.tokens


def test_adapters_come_and_go(server, llamas, tmp_path):
    save_adapter(llamas / "first", tmp_path / "right", r=8, lora_alpha=16, target_modules=ALL)
    save_adapter(save_tiny_model(tmp_path / "base"), tmp_path / "wrong", r=4, target_modules=ALL)
    response = post(server, "/v1/load_lora_adapter", lora_name="wrong", lora_path=str(tmp_path / "wrong"))
    assert response.status_code >= 400
    assert "for a layer of shape" in response.text
    response = post(server, "/v1/load_lora_adapter", lora_name="right", lora_path=str(tmp_path / "right"))
    assert response.status_code == 200, response.text
    assert ask(server, "right") == says(llamas / "first-twin", tmp_path / "right")
    assert ask(server) == says(llamas / "first-twin")
    assert post(server, "/v1/unload_lora_adapter", lora_name="right").status_code == 200
    assert post(server, "/v1/completions", model="right", prompt=PROMPT).status_code == 404


def test_sleep_pauses(server, llamas):
    assert httpx.post(f"{server.url}/sleep?level=1", timeout=60).status_code == 200
    assert httpx.get(f"{server.url}/is_sleeping", timeout=60).json() == {"is_sleeping": True}
    assert httpx.post(f"{server.url}/wake_up", timeout=60).status_code == 200
    assert ask(server) == says(llamas / "first-twin")


def halve(tensors):
    """What training the factors alone would leave: the same pivot rows, other values."""
    for name, tensor in tensors.items():
        if name.endswith(("_proj.pivot_weight", "_proj.weight")):
            tensor /= 2


@pytest.mark.skipif(vllm_before("0.32"), reason="before 0.32 nothing is checked before a reload")
def test_weights_are_replaced_or_kept(server, llamas, tmp_path):
    def reload(directory):
        return post(
            server, "/collective_rpc", method="reload_weights", kwargs={"weights_path": str(directory)}
        )

    copy_edited(llamas / "first-pifa", tmp_path / "trained", tensors=halve)
    copy_edited(llamas / "first-twin", tmp_path / "twin", tensors=halve)
    before, after = says(llamas / "first-twin"), says(tmp_path / "twin")
    assert before != after
    # Other ranks; and other pivot rows, which would leave these ranks other shares of the coefficients.
    for refused, reason in {
        "other": "expected 90, found 87",
        "second": "expected pivot rows that leave",
    }.items():
        response = reload(llamas / f"{refused}-pifa")
        assert response.status_code >= 400
        assert reason in response.text
        assert ask(server) == before
    response = reload(tmp_path / "trained")
    assert response.status_code == 200, response.text
    assert httpx.post(f"{server.url}/reset_prefix_cache", timeout=60).status_code == 200
    assert ask(server) == after
