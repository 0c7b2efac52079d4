"""vLLM + this package -> MiniGPT folders are served with no remote code.

vLLM calls `register` in each of its processes (entry point group `vllm.general_plugins`). By then the package is imported,
so that transformers knows the config and the model; what is left is to name the class of vLLM that runs them.
"""


def register() -> None:
    """Enter MiniGPT among vLLM's models: it runs on vLLM's transformers backend, with paged attention."""
    from vllm import ModelRegistry

    # By name, because importing the class would start up the device before vLLM has chosen it.
    ModelRegistry.register_model(
        "MiniGPTForCausalLM", "vllm.model_executor.models.transformers:TransformersForCausalLM"
    )
