"""Plugin with which vLLM serves MiniGPT folders without remote code.

vLLM calls `register` in each of its processes (entry point group `vllm.general_plugins`). Importing the package has already
registered configuration and model with transformers, so only the vLLM model class has to be registered.
"""


def register() -> None:
    """Register MiniGPT for vLLM's transformers backend, which uses paged attention."""
    from vllm import ModelRegistry

    # By name, because importing the class would initialize the device before vLLM selects it.
    ModelRegistry.register_model(
        "MiniGPTForCausalLM", "vllm.model_executor.models.transformers:TransformersForCausalLM"
    )
