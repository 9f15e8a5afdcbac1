"""Two engines behind one server: both answer, and both as transformers does."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from openai import OpenAI

pytest.importorskip("vllm")

from pifa_vllm.checkpoint import read_json
from tests.pifa_tiny import save_pifa_twin
from tests.plugin.test_engines import PROMPTS, TOKENS, ranks, transformers_says
from tests.release import vllm_before
from tests.server.serving import Server
from tests.tiny import save_tiny_model

pytestmark = [pytest.mark.vllm, pytest.mark.long]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    save_tiny_model(root / "dense", hidden=128, intermediate=176)
    save_pifa_twin(root / "dense", root / "pifa", root / "twin", ranks=ranks)
    return root


def test_two_engines_answer_as_one(models, tmp_path):
    flags = ("--data-parallel-size", "2", "--dtype", "float32", "--max-model-len", "256")
    server = Server(models / "pifa", tmp_path / "server.log", *flags)
    try:
        server.wait()
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=300)

        def ask(prompt):
            options = {"return_token_ids": True, "ignore_eos": True}
            answer = client.completions.create(
                model="tiny", prompt=prompt, max_tokens=TOKENS, temperature=0.0, extra_body=options
            )
            return answer.choices[0].token_ids

        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            answers = list(pool.map(ask, PROMPTS))
        for tokens, wanted in zip(answers, transformers_says(models / "twin"), strict=True):
            assert tokens[: wanted.certain] == wanted.tokens[: wanted.certain]
        served = server.metrics()
        by_engine = {
            engine: served.total("vllm:request_success_total", engine=engine) for engine in ("0", "1")
        }
        assert all(count > 0 for count in by_engine.values())
        assert sum(by_engine.values()) >= len(PROMPTS)
        caches = {
            engine: served.total("pifa_device_memory_bytes", engine=engine, part="kv_cache")
            for engine in ("0" if vllm_before("0.32") else "01")  # older ones tell of the first engine only
        }
        assert min(caches.values()) == max(caches.values()) > 0
        assert served.total("pifa_kv_cache_bytes") == sum(caches.values())
        config = read_json(models / "pifa" / "config.json")
        heads, size, layers = (config[k] for k in ("num_key_value_heads", "head_dim", "num_hidden_layers"))
        assert sum(caches.values()) == served.total("pifa_kv_cache_tokens") * 2 * heads * size * 4 * layers
    finally:
        assert server.stop() == 0
