"""Train small GPTs from scratch and load them anywhere through `AutoModelForCausalLM`.

Importing the package registers MiniGPT with the Auto classes and the causal LM mapping of transformers, so that model folders
load without `trust_remote_code`. It has no other side effects.
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

from .api import ModelFolder, evaluate, evaluate_tasks, generate, load, measure_copying, score_answers, train
from .model.configuration_minigpt import MiniGPTConfig
from .model.modeling_minigpt import (
    MiniGPTForCausalLM,
    MiniGPTForQuestionAnswering,
    MiniGPTForSequenceClassification,
    MiniGPTForTokenClassification,
    MiniGPTModel,
)

__version__ = "0.2.0"

AutoConfig.register("minigpt", MiniGPTConfig)
for auto_class, model_class in (
    (AutoModel, MiniGPTModel),
    (AutoModelForCausalLM, MiniGPTForCausalLM),
    (AutoModelForSequenceClassification, MiniGPTForSequenceClassification),
    (AutoModelForTokenClassification, MiniGPTForTokenClassification),
    (AutoModelForQuestionAnswering, MiniGPTForQuestionAnswering),
):
    auto_class.register(MiniGPTConfig, model_class)
    # `save_pretrained` then copies the two model files next to the weights, for loading as remote code.
    model_class.register_for_auto_class(auto_class.__name__)
del auto_class, model_class
# With label smoothing, the Trainer shifts the labels of the models in this mapping.
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
    "evaluate_tasks",
    "generate",
    "load",
    "measure_copying",
    "score_answers",
    "train",
]
