"""Tiny random models with a real tokenizer, so that tests run offline in seconds."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def save_tiny_model(
    directory: Path,
    architecture: str = "llama",
    *,
    hidden: int = 64,
    intermediate: int = 112,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    max_shard_size: str = "5GB",
    **overrides: object,
) -> Path:
    """Save a random model of this architecture with a byte-level tokenizer (vocabulary 258) to `directory`.

    Weights are scaled up from the usual initialisation, so that logits differ and greedy tokens are stable.
    """
    settings: dict[str, object] = {
        "vocab_size": 258,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 257,
    }
    config = AutoConfig.for_model(architecture, **{**settings, **overrides})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).to(torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(0.0, 0.1)
            elif "norm" in name:
                parameter.uniform_(0.8, 1.2)
            elif parameter.ndim == 2:
                # A decaying spectrum, as trained weights have, or no rank below full would do anything well.
                parameter.normal_(0.0, 1.5 / parameter.shape[1] ** 0.5)
                if "embed" not in name and "lm_head" not in name:
                    u, s, vh = torch.linalg.svd(parameter, full_matrices=False)
                    decay = torch.logspace(0, -1.5, s.numel())
                    parameter.copy_((u * (s * decay * 2.0)) @ vh)
    model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    save_byte_tokenizer(directory)
    return directory


def save_byte_tokenizer(directory: Path) -> None:
    """Save a byte-level tokenizer: ids 0 to 255 are bytes, 256 is <s>, 257 is </s>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(directory)
