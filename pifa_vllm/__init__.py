"""Low-rank compression of LLaMA models by MPIFA (arXiv 2501.19090), served by vLLM.

Importing this package registers the `pifa` quantizer with transformers as soon as transformers is imported
(see `pifa_vllm.hf`); it imports neither vLLM nor the compressor.
"""

from pifa_vllm.registration import register as _register

__version__ = "0.1.0"

_register()
