"""What pyproject.toml cannot say: packages are found, and server/ is installed under a name that is our own."""

from setuptools import find_packages, setup

setup(
    package_dir={"pifa_vllm_server": "server"},
    packages=[
        *find_packages(include=["pifa_vllm", "pifa_vllm.*"]),
        *(f"pifa_vllm_{name}" for name in find_packages(include=["server", "server.*"])),
    ],
)
