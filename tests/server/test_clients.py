"""The clients that users have: openai's, LangChain's, curl."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.release import vllm_before

pytest.importorskip("vllm")
openai = pytest.importorskip("openai")

pytestmark = pytest.mark.vllm

README = Path(__file__).parents[2] / "server" / "README.md"
MESSAGES = [{"role": "user", "content": "Hi"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"unit": {"enum": ["C", "F"]}},
            "required": ["unit"],
            "additionalProperties": False,
        },
    },
}
SCHEMA = {
    "type": "object",
    "properties": {"size": {"enum": ["small", "large"]}},
    "required": ["size"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120, max_retries=0)


def test_models(client):
    (model,) = client.models.list().data
    assert model.id == "tiny"


def test_chat_and_completions_count_their_tokens(client):
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=5, extra_body={"ignore_eos": True}
    )
    assert answer.usage.completion_tokens == 5
    assert answer.choices[0].finish_reason == "length"
    completion = client.completions.create(
        model="tiny", prompt=["Hi", "Ho"], max_tokens=3, n=2, extra_body={"ignore_eos": True}
    )
    assert len(completion.choices) == 4
    assert completion.usage.completion_tokens == 12


def test_streaming_says_what_the_whole_answer_says(client):
    request = {"model": "tiny", "messages": MESSAGES, "max_tokens": 12, "temperature": 0.0}
    whole = client.chat.completions.create(**request).choices[0].message.content
    chunks = list(
        client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole
    assert chunks[-1].usage.completion_tokens > 0
    assert len(chunks) > 3


def test_logprobs(client):
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=3, logprobs=True, top_logprobs=2, temperature=0.0
    )
    for token in answer.choices[0].logprobs.content:
        assert token.logprob <= 0.0
        assert len(token.top_logprobs) == 2
        assert token.logprob == max(other.logprob for other in token.top_logprobs)


def test_json_schema(client):
    answer = client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        max_tokens=60,
        response_format={"type": "json_schema", "json_schema": {"name": "size", "schema": SCHEMA}},
    )
    assert json.loads(answer.choices[0].message.content)["size"] in ("small", "large")


def test_tools(client, checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    # A random model would fill its answer with spaces.
    spaces = tokenizer(" \t\n\r", add_special_tokens=False).input_ids
    answer = client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        max_tokens=100,
        logit_bias={str(token): -100 for token in spaces},
        tools=[WEATHER],
        tool_choice={"type": "function", "function": {"name": "weather"}},
    )
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "weather"
    arguments = json.loads(call.function.arguments)
    # Older ones hold the model to JSON, and to the tool's schema from --tool-strict-level on.
    assert vllm_before("0.32") or arguments["unit"] in ("C", "F")


def test_errors_are_the_clients_exceptions(client):
    with pytest.raises(openai.NotFoundError, match="another"):
        client.chat.completions.create(model="another", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError, match="16"):
        client.chat.completions.create(model="tiny", messages=MESSAGES, n=17)


def test_langchain(server):
    langchain = pytest.importorskip("langchain_openai")
    model = langchain.ChatOpenAI(
        model="tiny", base_url=f"{server.url}/v1", api_key="none", max_tokens=60, temperature=0.0, timeout=120
    )
    answer = model.invoke("Hi")
    assert answer.usage_metadata["output_tokens"] > 0
    assert "".join(piece.content for piece in model.stream("Hi")) == answer.content
    structured = model.with_structured_output({"title": "size", **SCHEMA}, method="json_schema")
    assert structured.invoke("Hi")["size"] in ("small", "large")


def curl_examples():
    blocks = re.findall(r"```bash\n(.*?)```", README.read_text(), flags=re.DOTALL)
    return [block for block in blocks if block.startswith("curl ")]


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
@pytest.mark.parametrize("example", curl_examples())
def test_curl_examples_of_the_readme(server, example):
    command = example.replace("http://localhost:8000", server.url).replace("my-model", "tiny")
    answer = subprocess.run(
        ["bash", "-c", command.replace("curl ", "curl --fail-with-body -sS ", 1)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert answer.stdout


def test_python_example_of_the_readme(server, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    code = example.replace("http://localhost:8000", server.url).replace("my-model", "tiny")
    exec(compile(code, str(README), "exec"), {})
    assert capsys.readouterr().out.strip()
