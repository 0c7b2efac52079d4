"""Train a small GPT from scratch on your own text, and load it anywhere through `AutoModelForCausalLM`.

Importing the package registers MiniGPT with the Auto classes of transformers, so that a model folder loads without
`trust_remote_code`. It does nothing else.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .api import ModelFolder, evaluate, generate, load, train
from .model.configuration_minigpt import MiniGPTConfig
from .model.modeling_minigpt import (
    MiniGPTForCausalLM,
    MiniGPTForQuestionAnswering,
    MiniGPTForSequenceClassification,
    MiniGPTForTokenClassification,
    MiniGPTModel,
)

__version__ = "0.1.0"

AutoConfig.register("minigpt", MiniGPTConfig)
for auto_class, model_class in (
    (AutoModel, MiniGPTModel),
    (AutoModelForCausalLM, MiniGPTForCausalLM),
    (AutoModelForSequenceClassification, MiniGPTForSequenceClassification),
    (AutoModelForTokenClassification, MiniGPTForTokenClassification),
    (AutoModelForQuestionAnswering, MiniGPTForQuestionAnswering),
):
    auto_class.register(MiniGPTConfig, model_class)
    # From now on `save_pretrained` puts the two model files beside the weights: the folder carries its own code.
    model_class.register_for_auto_class(auto_class.__name__)
del auto_class, model_class
# The Trainer looks here whether labels are to be shifted when it smooths them.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["minigpt"] = MiniGPTForCausalLM.__name__

__all__ = [
    "MiniGPTConfig",
    "MiniGPTForCausalLM",
    "MiniGPTForQuestionAnswering",
    "MiniGPTForSequenceClassification",
    "MiniGPTForTokenClassification",
    "MiniGPTModel",
    "ModelFolder",
    "__version__",
    "evaluate",
    "generate",
    "load",
    "train",
]
