"""Which vLLM this plugin works in, and what of it: said here, checked before anything is hooked.

Invariant: what is not known to work is refused by name before the model is loaded, never served unsteered.
"""

from typing import Any

from trimtab.errors import UnsupportedModel

TESTED = ("0.32.0",)  # tests and benchmarks/vllm_parity.py ran there (V1 runner, CPU)
FROM, BELOW = (0, 31), (0, 34)  # what we hook was read in all of these


def check_version(version: str) -> None:
    """Raise UnsupportedModel for a vLLM that was not looked at."""
    numbers = version.partition("+")[0].split(".")
    try:
        found = int(numbers[0]), int(numbers[1])
    except (IndexError, ValueError):
        found = (0, 0)
    if not FROM <= found < BELOW:
        low, high = (".".join(map(str, bound)) for bound in (FROM, BELOW))
        raise UnsupportedModel(
            f"vLLM {version} is not supported by trimtab's plugin, which hooks into vllm>={low},<{high} "
            f"(tested: {', '.join(TESTED)}): install one of those, or start vLLM without --logits-processors"
        )


def check_engine(vllm_config: Any) -> None:
    """Raise UnsupportedModel for settings under which rows are drawn where we do not see them."""
    parallel = vllm_config.parallel_config
    refused = {
        "speculative decoding draws tokens from a draft that is not steered": vllm_config.speculative_config,
        "--enable-batch-sharded-sampling draws each row on one rank, which sees a part of the logits": getattr(
            parallel, "enable_batch_sharded_sampling", None
        ),
        "the external_launcher with pipeline parallelism draws on ranks that have no hidden states": (
            parallel.distributed_executor_backend == "external_launcher" and parallel.pipeline_parallel_size > 1
        ),
        "pooling models draw no tokens": vllm_config.model_config.runner_type == "pooling",
    }
    for why, asked in refused.items():
        if asked:
            raise UnsupportedModel(f"trimtab's plugin cannot steer this engine: {why}. Leave that out")
