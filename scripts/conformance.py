"""Run transformers' own model tests on MiniGPT, and on Llama and Qwen3 for comparison.

    python scripts/conformance.py PATH [--models minigpt llama qwen3] [--slow] [pytest options]

PATH is a checkout of transformers at the installed release; it is not modified. For each model, a test module that
subclasses `CausalLMModelTest` of the checkout is generated in a temporary folder; the classes under test are the
installed ones. MiniGPT is tested with the configuration used for Llama, and with grouped-query attention and a sliding
window. Prints the numbers of passed, failed and skipped tests. The exit code is 1 if a MiniGPT test fails or if fewer
of them pass than of Llama's.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

# The tests look up the model class in these mappings to decide which labels to generate.
MAPPINGS = {
    "MODEL_MAPPING_NAMES": "Model",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "ForCausalLM",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "ForSequenceClassification",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": "ForTokenClassification",
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES": "ForQuestionAnswering",
}
MODULE = """
import unittest

import {package} as package
from transformers.models.auto import modeling_auto
from tests import test_fsdp_mixin, test_tensor_parallel_mixin
from tests.causal_lm_tester import CausalLMModelTest, CausalLMModelTester

test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None  # by default, a list of model types
test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None
for mapping, suffix in {mappings}.items():
    getattr(modeling_auto, mapping)[package.{name}Config.model_type] = "{name}" + suffix


class Tester(CausalLMModelTester):
    config_class = package.{name}Config
    base_model_class = package.{name}Model
    causal_lm_class = package.{name}ForCausalLM
    question_answering_class = package.{name}ForQuestionAnswering
    sequence_classification_class = package.{name}ForSequenceClassification
    token_classification_class = package.{name}ForTokenClassification

    def __init__(self, parent):
        super().__init__(parent, **{heads})
        for setting, value in {settings}.items():
            setattr(self, setting, value)


class Test{name}(CausalLMModelTest, unittest.TestCase):
    model_tester_class = Tester
    model_split_percents = [0.5, 0.7, 0.8]
"""
# A test with skipped subtests counts as passed, one with a failed subtest as failed.
RECORD = """
def pytest_runtest_logreport(report):
    is_test = type(report).__name__ == "TestReport" and (report.when == "call" or report.skipped)
    if is_test or report.failed:
        with open({report!r}, "a") as file:
            print(report.nodeid, report.outcome, file=file)
"""
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2}
WINDOW = {"head_dim": 16, "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}
MODELS = {
    "minigpt": ("minigpt_hf", "MiniGPT", {}, {}),
    "minigpt-window": ("minigpt_hf", "MiniGPT", GROUPED, WINDOW),
    "llama": ("transformers", "Llama", {}, {}),
    "qwen3": ("transformers", "Qwen3", {}, {}),
    "qwen3-window": ("transformers", "Qwen3", GROUPED, WINDOW),
}


def outcomes(model: str, checkout: Path, slow: bool, options: list[str]) -> dict[str, list[str]]:
    """Run the tests of one model. Returns the names of the tests by outcome."""
    package, name, heads, settings = MODELS[model]
    with tempfile.TemporaryDirectory() as folder:
        module, report = Path(folder) / f"test_conformance_{name.lower()}.py", Path(folder) / "outcomes"
        module.write_text(MODULE.format(package=package, name=name, mappings=MAPPINGS, heads=heads, settings=settings))
        (Path(folder) / "conftest.py").write_text(RECORD.format(report=str(report)))
        (Path(folder) / "pytest.ini").write_text("[pytest]\n")  # use neither project's pytest settings
        # The working directory is the checkout, so that `tests` refers to its package.
        argv = [sys.executable, "-m", "pytest", module, "--quiet", "--rootdir", folder, "-c", f"{folder}/pytest.ini"]
        argv += ["-p", "no:cacheprovider", "--tb", "short", *options]
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "RUN_SLOW": "1" if slow else "0", "PYTHONDONTWRITEBYTECODE": "1"}
        code = subprocess.run([str(word) for word in argv], cwd=checkout, env=env).returncode
        if code > 1:  # 0: all passed, 1: some failed, above: no tests ran
            sys.exit(code)
        outcome = {}
        for line in report.read_text().splitlines():
            test, result = line.rsplit(" ", 1)
            if outcome.get(test) != "failed":
                outcome[test] = result
    results = {"passed": [], "failed": [], "skipped": []}
    for test, result in outcome.items():
        results[result].append(test.split("::")[-1])
    return results


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("transformers", type=Path, help="a checkout of transformers")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["minigpt", "minigpt-window", "llama"])
    parser.add_argument("--slow", action="store_true", help="include tests that transformers marks as slow")
    arguments, options = parser.parse_known_args(argv)
    if not (arguments.transformers / "tests" / "causal_lm_tester.py").exists():
        print(
            f"{arguments.transformers} is not a checkout of transformers: tests/causal_lm_tester.py is missing; create it "
            f"with git clone --branch v{version('transformers')} https://github.com/huggingface/transformers",
            file=sys.stderr,
        )
        return 2
    table = {}
    for model in arguments.models:
        table[model] = outcomes(model, arguments.transformers.resolve(), arguments.slow, options)
    for model, results in table.items():
        counts = ", ".join(f"{len(names)} {result}" for result, names in results.items())
        print(f"{model:16}{counts}{''.join(f'{chr(10)}    {name}' for name in results['failed'])}")
    ours = [results for model, results in table.items() if model.startswith("minigpt")]
    required = len(table["llama"]["passed"]) if "llama" in table else 0
    return 1 if any(results["failed"] or len(results["passed"]) < required for results in ours) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
