"""Attacks by config.json: our section, sizes that lie, JSON bombs, and what makes loaders look elsewhere."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from tests.attacks.spoiling import (
    CONFIG,
    Kind,
    Q,
    Spoil,
    both,
    config,
    edited,
    file,
    instead,
    rank,
    section,
    sparse,
    text,
)

DIGITS = "9" * 5000

ours = Kind("quantization_config")
ours.add("future version", section(format_version=3), CONFIG, "format_version 3")
ours.add("version true", section(format_version=True), CONFIG, "format_version")
ours.add(
    "version of 5,000 digits", instead('"format_version": 1', f'"format_version": {DIGITS}'), CONFIG, "digits"
)
ours.add("version of 4,000 digits", section(format_version=10**4000), CONFIG, "format_version")
ours.add(
    "no version", edited(lambda c: c["quantization_config"].pop("format_version")), CONFIG, "format_version"
)
ours.add("unknown key", section(bits=4), CONFIG, "quantization_config.bits")
ours.add("density 7", section(density=7), CONFIG, "quantization_config.density")
ours.add("density NaN", section(density=math.nan), CONFIG, "NaN")
ours.add(
    "density 1e999",
    text(lambda old: old.replace('"density": 0', '"density": 1e999, "x": 0')),
    CONFIG,
    "1e999",
)
ours.add("ranks that are a list", section(ranks=[1, 2]), CONFIG, "quantization_config.ranks")
ours.add(
    "provenance of 100 levels",
    section(provenance=json.loads('{"a":' * 100 + "1" + "}" * 100)),
    CONFIG,
    "nest",
)
ours.add(
    "provenance of 10,000 levels",
    instead('"provenance": {', '"provenance": {"a":' + "[" * 10_000),
    CONFIG,
    "JSON",
)
ours.add(
    "no PIFA but its tensors",
    edited(lambda c: c.pop("quantization_config")),
    CONFIG,
    "quant_method",
    foreign="transformers vllm",
)
ours.add("rank one too high", rank(33), Q, "33")
ours.add("rank one too low", rank(31), Q, "31")
ours.add("rank 0", rank(0), Q, "0")
ours.add("rank beyond the matrix", rank(10**6), Q, "1000000")
ours.add("rank 2^63", rank(2**63), Q, str(2**63))
ours.add("rank of 4,000 digits", rank(10**4000), Q)
ours.add("negative rank", rank(-1), CONFIG, Q, "-1")
ours.add("fractional rank", rank(32.0), CONFIG, Q, "32.0")
ours.add("rank true", rank(True), CONFIG, Q, "True")
ours.add("rank NaN", rank(math.nan), CONFIG, "NaN")
ours.add("rank in words", rank("32"), CONFIG, Q, "'32'")
ours.add(
    "module that is not there", rank(3, "model.layers.7.self_attn.q_proj"), "model.layers.7.self_attn.q_proj"
)
ours.add("module that is not named", edited(lambda c: c["quantization_config"]["ranks"].pop(Q)), Q, "ranks")
ours.add("module with an escape sequence", rank(3, "a\x1b]0;owned\x07"), CONFIG, "ranks", r"\x1b")
ours.add("module of a million letters", rank(3, "x" * 10**6), CONFIG, "ranks")
ours.add(
    "a million modules",
    edited(lambda c: c["quantization_config"]["ranks"].update({f"m{i}": 1 for i in range(500_000)})),
    CONFIG,
    "bytes",
)

sizes = Kind("sizes in config.json")
for field, lies in {
    "num_hidden_layers": (10_000_000, 10**18, 1000, 3, 1, 0, -1, 2.0, "2", None, True, [2], 10**4000),
    "hidden_size": (2**40, 129, 0, -128, None, 1e9),
    "intermediate_size": (2**40, 2**31, 175, 0, None),
    "vocab_size": (2**40, 259, 0, None),
    "num_attention_heads": (0, 2**31, 8, -4, None, "4"),
    "num_key_value_heads": (0, 10**9, 3, -1),
    "head_dim": (0, 10**9, 33, -32),
    "max_position_embeddings": (10**15, 2**30, 0, -1, "512"),
}.items():
    for lie in lies:
        shown = json.dumps(lie) if len(json.dumps(lie)) < 30 else "a number of 4,000 digits"
        sizes.add(f"{field} {shown}", config(**{field: lie}), field)
for base, lie in (("qwen2", 10_000_000), ("qwen3", 10_000_000), ("mistral", 10_000_000)):
    # Some configs list their layers as soon as they are built.
    sizes.add(
        f"ten million layers of {base}", config(num_hidden_layers=lie), CONFIG, "num_hidden_layers", base=base
    )
sizes.add("head_dim of another qwen3", config(head_dim=64), "q_proj", base="qwen3")
sizes.add(
    "layers of 5,000 digits",
    instead('"num_hidden_layers": 2', f'"num_hidden_layers": {DIGITS}'),
    CONFIG,
    "digits",
)
sizes.add(
    "layers twice",
    instead('"num_hidden_layers": 2', '"num_hidden_layers": 9999999, "num_hidden_layers": 2'),
    CONFIG,
    "num_hidden_layers",
    "twice",
)


def rope(**parameters: Any) -> Spoil:
    return config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, **parameters})


sizes.add("rope factor 10^12", rope(factor=1e12), CONFIG, "rope_parameters.factor")
sizes.add("rope factor 10^6", rope(factor=1e6), CONFIG, "rope_parameters")
sizes.add("rope factor in words", rope(factor="2"), CONFIG, "rope_parameters.factor")
sizes.add(
    "rope context 10^12", rope(original_max_position_embeddings=10**12), CONFIG, "original_max_position"
)
sizes.add(
    "rope scaling, old name", config(rope_scaling={"type": "linear", "factor": 1e12}), CONFIG, "rope_scaling"
)
sizes.add("rope scaling that is a list", config(rope_scaling=[2.0]), CONFIG, "rope_scaling")

elsewhere = Kind("another model or code")
PYTHON = "import pathlib; pathlib.Path(__file__).with_name('OWNED').touch()\n"
AUTO_MAP = {"AutoConfig": "owned.C", "AutoModelForCausalLM": "owned.M"}
elsewhere.add(
    "auto_map and its Python file",
    both(config(auto_map=AUTO_MAP), file("owned.py", PYTHON)),
    CONFIG,
    "auto_map",
)
elsewhere.add("auto_map to a repository", config(auto_map={"AutoConfig": "a/b--owned.C"}), CONFIG, "auto_map")
elsewhere.add("auto_map that is a list", config(auto_map=["owned.C"]), CONFIG, "auto_map")
elsewhere.add(
    "auto_map of the tokenizer",
    text(
        lambda old: json.dumps({**json.loads(old), "auto_map": {"AutoTokenizer": [None, "owned.T"]}}),
        "tokenizer_config.json",
    ),
    "tokenizer_config.json",
    "auto_map",
)
elsewhere.add(
    "auto_map of a processor",
    file("processor_config.json", '{"auto_map": {"AutoProcessor": "owned.P"}}'),
    "processor_config.json",
    "auto_map",
)
elsewhere.add("Python file", file("owned.py", PYTHON), "owned.py")
elsewhere.add("shared library", file("owned.so", b"\x7fELF"), "owned.so")
elsewhere.add("code for generate()", file("custom_generate/generate.py", PYTHON), "custom_generate")
elsewhere.add(
    "config of another version",
    both(
        config(configuration_files=["config.4.0.0.json"]), file("config.4.0.0.json", '{"model_type": "gpt2"}')
    ),
    CONFIG,
    "configuration_files",
)
elsewhere.add("nested text_config", config(text_config={"num_hidden_layers": 10**7}), CONFIG, "text_config")
elsewhere.add(
    "speculators_config",
    config(speculators_config={"verifier": {"name_or_path": "a/b"}}),
    CONFIG,
    "speculators_config",
)
elsewhere.add(
    "adapter of another model",
    file("adapter_config.json", '{"base_model_name_or_path": "/nowhere"}'),
    "adapter_config.json",
    theirs="transformers",
)
elsewhere.add(
    "params.json of Mistral's format",
    both(file("params.json", '{"dim": 1}'), lambda d: (d / "consolidated.safetensors").write_bytes(b"")),
    "params.json",
)
elsewhere.add("another model_type", config(model_type="mixtral"), CONFIG, "model_type", "mixtral")
elsewhere.add("no model_type", config(model_type=None), CONFIG, "model_type")
elsewhere.add("another architecture", config(architectures=["MixtralForCausalLM"]), CONFIG, "architectures")
elsewhere.add(
    "two architectures",
    config(architectures=["LlamaForCausalLM", "GPT2LMHeadModel"]),
    CONFIG,
    "architectures",
)
elsewhere.add(
    "layers as JSON escapes hide them",
    both(config(num_hidden_layers=10**7), instead('"pifa"', '"\\u0070ifa"')),
    CONFIG,
    "num_hidden_layers",
)
for name in (
    "pytorch_model.bin",
    "training_args.bin",
    "model.pt",
    "optimizer.pth",
    "x.ckpt",
    "x.pkl",
    "x.PICKLE",
):
    elsewhere.add(f"pickle {name}", file(name, b"\x80\x05cos\nsystem\n"), name)
elsewhere.add(
    "pickle in place of the shard",
    both(
        file("pytorch_model.bin", b"\x80\x05"),
        lambda d: (d / "model.safetensors").unlink(),
        lambda d: (d / "model.safetensors.index.json").unlink(),
    ),
    "pytorch_model.bin",
    theirs="transformers",
)

bombs = Kind("config.json as JSON")
bombs.add("empty", text(lambda old: ""), CONFIG, theirs="transformers vllm")
bombs.add("cut off", text(lambda old: old[: len(old) // 2]), CONFIG, "JSON", theirs="transformers vllm")
bombs.add("a list", text(lambda old: f"[{old}]"), CONFIG, "list")
bombs.add("100,000 levels", instead("{", '{"a":' + "[" * 100_000 + "]" * 100_000 + ","), CONFIG)
bombs.add("500 levels", instead("{", '{"a":' + "[" * 500 + "]" * 500 + ","), CONFIG, "nest")
bombs.add("not UTF-8", text(lambda old: old.encode() + b"\xff"), CONFIG, "JSON")
bombs.add("byte order mark", text(lambda old: b"\xef\xbb\xbf" + old.encode()), CONFIG, "JSON")
bombs.add("17 MiB of blanks", text(lambda old: old + " " * (17 << 20)), CONFIG, "bytes")
bombs.add("4 million empty lists", instead("{", '{"a":[' + "[]," * (4 << 20) + "[]],"), CONFIG, "a")
bombs.add("5 GB", sparse(CONFIG, 5 << 30), CONFIG, str(5 << 30))
bombs.add(
    "our section twice",
    instead('"quantization_config"', '"quantization_config": 1, "quantization_config"'),
    CONFIG,
    "quantization_config",
    "twice",
)
bombs.add(
    "infinite theta", instead('"rms_norm_eps": ', '"rms_norm_eps": Infinity, "x": '), CONFIG, "Infinity"
)


def directory_in_place(directory: Path) -> None:
    (directory / CONFIG).unlink()
    (directory / CONFIG).mkdir()


bombs.add("a directory", directory_in_place, CONFIG, "directory", theirs="transformers vllm")
