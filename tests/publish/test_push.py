"""What is pushed loads anywhere at every moment, in one commit; faults are told in one line; the token goes nowhere."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard, constants, login
from transformers import AutoModelForCausalLM, AutoTokenizer

from minigpt_hf import doctor
from minigpt_hf.cli import main
from minigpt_hf.data.tokenizer import tokenizer_fingerprint
from minigpt_hf.publish.model_folder import REQUIRED, published_files
from minigpt_hf.publish.push import push_folder
from tests.conftest import random_ids, tiny_model
from tests.hub_server import TOKEN

MODEL = {*REQUIRED, "figures/loss.png", "figures/training.png"}
CODE = {"configuration_minigpt.py", "modeling_minigpt.py"}


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """huggingface_hub tries five times, for 23 seconds in all; here it does so without a pause."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)


@pytest.fixture(autouse=True)
def files_alone(monkeypatch, request):
    """The doctor's whole examination starts processes; here it looks at the files, but for the test that is about it."""
    if "doctor" not in request.node.name:
        monkeypatch.setattr(doctor, "examine", doctor.examine_files)


def test_what_the_doctor_faults_is_not_pushed(run_folder, hub, tmp_path, capsys):
    """A folder whose weights are finite and well-formed, and do not load: only the whole examination finds that."""
    shutil.copytree(run_folder / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    code, _, err = push(capsys, tmp_path / "model", "--repo-id", "user/ill")
    assert code == 2
    assert re.fullmatch("minigpt push: .*: not uploaded, checks failed: .*minigpt doctor .* prints the remedies\n", err)
    assert not any(request.path.startswith("/api/repos/create") for request in hub.requests)


def push(capsys, *argv) -> tuple[int, str, str]:
    code = main(["push", *(str(word) for word in argv)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def titles(hub, repo_id: str, revision: str = "main") -> list[str]:
    return [commit["title"] for commit in hub.repository(repo_id).history(revision)]


def local(folder) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in published_files(folder)}


def uploaded(hub, repo_id: str, revision: str = "main") -> dict[str, bytes]:
    files = hub.files(repo_id, revision)
    del files[".gitattributes"]
    return files


# -- what arrives -----------------------------------------------------------------------------------------------------

IN_A_CLEAN_PROCESS = """
import json, re, sys
sys.modules["minigpt_hf"] = None  # importing it fails: the repository has to do without
import torch
from huggingface_hub import hf_hub_download
from transformers import AutoModelForCausalLM, AutoTokenizer

ids, expected, commits, alone = torch.load(sys.argv[1])
load = AutoModelForCausalLM.from_pretrained
for where in ({}, {"revision": "old"}, {"revision": commits[0]}, {"revision": "main", "code_revision": commits[1]}):
    model = load("user/tiny", trust_remote_code=True, **where)
    assert type(model).__module__.startswith("transformers_modules"), type(model)
    assert torch.equal(model(ids).logits, expected), where
    assert model.generation_config.temperature == 0.8
    tokenizer = AutoTokenizer.from_pretrained("user/tiny", trust_remote_code=True, **where)
    assert tokenizer.decode(tokenizer("def f(x):\\n").input_ids) == "def f(x):\\n"
native = load("user/tiny", revision="native", trust_remote_code=False)
assert type(native).__name__ == "Qwen3ForCausalLM"
assert torch.equal(native(ids).logits, expected)
with open(hf_hub_download("user/tiny", "README.md")) as card:
    snippet = re.search(r"```python\\n(.*?)```", card.read(), re.DOTALL)[1]
exec(snippet)

for commit, has_model, has_tokenizer in alone:  # pushed by `push_to_hub` of model and tokenizer, in turn
    if has_model:
        model = load("user/alone", revision=commit, trust_remote_code=True)
        assert torch.equal(model(ids).logits, expected)
        assert model.generation_config.temperature == 0.8
    if has_tokenizer:
        AutoTokenizer.from_pretrained("user/alone", revision=commit, trust_remote_code=True)
print("all loaded")
"""


def test_what_was_pushed_loads_in_a_clean_process_at_every_revision(run_folder, hub, tmp_path, capsys):
    folder = run_folder / "model"
    assert push(capsys, folder, "--repo-id", "user/tiny", "--revision", "old")[0] == 0
    code, out, err = push(capsys, folder, "--repo-id", "user/tiny", "--native")
    assert (code, err) == (0, "")
    assert out == f"{hub.endpoint}/user/tiny\n{hub.endpoint}/user/tiny/tree/native\n"
    assert titles(hub, "user/tiny") == titles(hub, "user/tiny", "native") == ["Upload model", "initial commit"]
    assert set(uploaded(hub, "user/tiny")) == MODEL
    twin = uploaded(hub, "user/tiny", "native")
    assert set(twin) == MODEL - CODE
    assert twin["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert "auto_map" not in json.loads(twin["config.json"])

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for _ in range(2):
        tokenizer.push_to_hub("user/alone")
        model.push_to_hub("user/alone")
        model.config.use_cache = not model.config.use_cache  # the second time something differs
    alone = []
    for commit in hub.repository("user/alone").history():
        files = set(commit["files"])
        alone.append((commit["sha"], "model.safetensors" in files, "tokenizer.json" in files))
        if "model.safetensors" in files:
            assert files >= {*CODE, "config.json", "generation_config.json", "README.md"}
        if "tokenizer.json" in files:
            assert files >= {"tokenizer_config.json", "README.md"}
    assert sum(has_model for _, has_model, _ in alone) == 2
    ids = random_ids(2, 40)
    commits = [hub.repository("user/tiny").branches()[branch] for branch in ("main", "old")]
    torch.save([ids, model(ids).logits, commits, alone], tmp_path / "expected.pt")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    hugging_face = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", IN_A_CLEAN_PROCESS, tmp_path / "expected.pt"],
        env={**environment, **hugging_face, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.endswith("all loaded\n"), done.stderr


def test_the_card_names_the_repository_unless_somebody_wrote_in_it(run_folder, hub, tmp_path):
    push_folder(run_folder / "model", "user/tiny")
    card = uploaded(hub, "user/tiny")["README.md"].decode()
    assert '.from_pretrained("user/tiny", trust_remote_code=True)' in card
    assert ModelCard(card).data.eval_results
    shutil.copytree(run_folder / "model", tmp_path / "model")
    mine = (tmp_path / "model" / "README.md").read_text() + "\nWritten by hand.\n"
    (tmp_path / "model" / "README.md").write_text(mine)
    push_folder(tmp_path / "model", "user/tiny")
    assert uploaded(hub, "user/tiny")["README.md"].decode() == mine


def test_only_files_of_a_model_travel_and_nothing_stale_stays(run_folder, hub, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(run_folder / "model", folder)
    for name in ("optimizer.pt", "notes.txt", ".env", "figures/secret.txt", "sub/config.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("private")
    old = {"model-00001-of-00001.safetensors": b"old", "model.safetensors.index.json": b"{}", "figures/old.png": b"old"}
    hub.put("user/tiny", {**old, "space.gguf": b"of somebody else", "notes.txt": b"theirs"})
    push_folder(folder, "user/tiny")
    files = uploaded(hub, "user/tiny")
    assert set(files) == MODEL | {"space.gguf", "notes.txt"}
    assert files["notes.txt"] == b"theirs"
    assert titles(hub, "user/tiny") == ["Upload model", "put", "initial commit"]
    push_folder(folder, "user/tiny")  # nothing is new: no commit
    assert titles(hub, "user/tiny") == ["Upload model", "put", "initial commit"]


def test_shards_travel_with_their_index(run_folder, hub, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(run_folder / "model", folder)
    (folder / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(run_folder / "model").save_pretrained(folder, max_shard_size="60KB")
    shards = {file.name for file in folder.glob("model-*.safetensors")}
    assert len(shards) > 1
    push_folder(run_folder / "model", "user/tiny")
    push_folder(folder, "user/tiny")
    assert set(uploaded(hub, "user/tiny")) == MODEL - {"model.safetensors"} | shards | {"model.safetensors.index.json"}


def test_private_is_private_or_refused(run_folder, hub, capsys):
    assert push(capsys, run_folder / "model", "--repo-id", "user/hidden", "--private")[0] == 0
    assert hub.repository("user/hidden").private
    assert push(capsys, run_folder / "model", "--repo-id", "user/open")[0] == 0
    code, _, err = push(capsys, run_folder / "model", "--repo-id", "user/open", "--private")
    assert (code, err.count("\n")) == (2, 1)
    assert "user/open: is there already, and public" in err


def test_who_has_logged_in_needs_no_variable(run_folder, hub, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    for name in ("HF_TOKEN_PATH", "HF_STORED_TOKENS_PATH"):
        monkeypatch.setattr(constants, name, str(tmp_path / name))
    login(TOKEN)
    capsys.readouterr()
    assert push(capsys, run_folder / "model", "--repo-id", "user/tiny")[0] == 0


# -- what is refused before anything is sent --------------------------------------------------------------------------


def test_what_cannot_be_pushed_is_told_in_one_line_and_nothing_is_sent(run_folder, hub, tmp_path, capsys, monkeypatch):
    half, linked = tmp_path / "half", tmp_path / "linked"
    for folder in (half, linked):
        shutil.copytree(run_folder / "model", folder)
    (half / "tokenizer.json").unlink()
    (linked / "README.md").unlink()
    (linked / "README.md").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").write_text("private")
    model = run_folder / "model"
    cases = [
        ([half, "--repo-id", "user/tiny"], "half: no model folder, it lacks tokenizer.json"),
        ([tmp_path / "absent", "--repo-id", "user/tiny"], "absent: no model folder"),
        ([run_folder, "--repo-id", "user/tiny"], "this is a run; its model is in"),
        ([linked, "--repo-id", "user/tiny"], r"README\.md: is a link"),
        ([model, "--repo-id", "user/tiny", "--native", "--revision", "native"], "the twin without code goes there"),
        ([model, "--repo-id", "user/../tiny"], "Repo id must"),
        ([model], "--repo-id"),
    ]
    for argv, message in cases:
        code, out, err = push(capsys, *argv)
        assert (code, out) == (2, ""), argv
        assert re.fullmatch(f"minigpt push: .*{message}.*\n", err), err
    monkeypatch.delenv("HF_TOKEN")
    code, _, err = push(capsys, model, "--repo-id", "user/tiny")
    assert (code, err) == (
        2,
        "minigpt push: there is no token for the Hub: log in with `hf auth login`, or set HF_TOKEN\n",
    )
    assert hub.requests == []


# -- faults -----------------------------------------------------------------------------------------------------------

FAULTS = {
    "401 to all": ("POST", "/api/", 401, "answered 401 .*log in again with `hf auth login`"),
    "403 to all": ("POST", "/api/", 403, "answered 403 .*your token may not write there"),
    "403 at the commit": ("POST", "/commit/", 403, "answered 403 .*your token may not write there"),
    "404 before the upload": ("POST", "/preupload/", 404, "answered 404 .*there is no such repository or branch"),
    "409 at the commit": ("POST", "/commit/", 409, "answered 409 .*another change of it is under way"),
    "412 at the commit": ("POST", "/commit/", 412, "answered 412 .*somebody else has pushed"),
    "429 before the upload": ("POST", "/preupload/", 429, "answered 429 .*too many requests"),
    "429 at the commit": ("POST", "/commit/", 429, "answered 429 .*too many requests"),
    "500 in the storage": ("PUT", "/lfs/", 500, "answered 500 .*try again later"),
    "500 at the commit": ("POST", "/commit/", 500, "answered 500 .*try again later"),
    "503 at the card": ("POST", "/validate-yaml", 503, "answered 503 .*try again later"),
    "dies within the weights": ("PUT", "/lfs/", "disconnect", "the connection to .* broke"),
    "dies within the commit": ("POST", "/commit/", "disconnect", "the connection to .* broke"),
    "dies at the door": ("POST", "/repos/create", "disconnect", "the connection to .* broke"),
    "the answer is lost": ("POST", "/commit/", "lost", "the connection to .* broke.*what is there is whole"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told_in_one_line_main_stays_whole_and_a_second_try_completes(
    fault, run_folder, hub, tmp_path, capsys
):
    earlier = tmp_path / "earlier"
    shutil.copytree(run_folder / "model", earlier)
    tiny_model(vocab_size=300).save_pretrained(earlier)
    push_folder(earlier, "user/tiny")
    before, now = uploaded(hub, "user/tiny"), local(run_folder / "model")
    now["README.md"] = before["README.md"]
    assert before["model.safetensors"] != now["model.safetensors"]

    method, path, kind, message = FAULTS[fault]
    hub.fail(method, path, kind)
    code, out, err = push(capsys, run_folder / "model", "--repo-id", "user/tiny")
    assert (code, out) == (2, "")
    assert re.fullmatch(f"minigpt push: user/tiny: .*{message}.*\n", err), err
    hub.faults.clear()
    assert uploaded(hub, "user/tiny") == (now if kind == "lost" else before)
    code, out, err = push(capsys, run_folder / "model", "--repo-id", "user/tiny")
    assert (code, out, err) == (0, f"{hub.endpoint}/user/tiny\n", "")
    assert uploaded(hub, "user/tiny") == now
    assert titles(hub, "user/tiny") == ["Upload model", "Upload model", "initial commit"]


def test_a_hub_that_stumbles_or_is_slow_is_waited_for(run_folder, hub, capsys):
    hub.fail("PUT", "/lfs/", 500, times=2)
    hub.fail("POST", "/preupload/", 429, times=1)
    hub.fail("POST", "/commit/", "slow")
    code, out, err = push(capsys, run_folder / "model", "--repo-id", "user/tiny")
    assert (code, out, err) == (0, f"{hub.endpoint}/user/tiny\n", "")
    assert set(uploaded(hub, "user/tiny")) == MODEL


def test_who_pushes_at_the_same_time_is_not_overwritten(run_folder, hub, monkeypatch):
    """Between looking and committing somebody else commits: the Hub refuses, since another head was looked at."""
    from huggingface_hub import HfApi

    preupload = HfApi.preupload_lfs_files

    def meanwhile(self, *args, **kwargs):
        hub.put("user/tiny", {"notes.txt": b"theirs"})
        return preupload(self, *args, **kwargs)

    monkeypatch.setattr(HfApi, "preupload_lfs_files", meanwhile)
    with pytest.raises(OSError, match=r"answered 412 \(A commit has happened since.*try again"):
        push_folder(run_folder / "model", "user/tiny")
    assert set(uploaded(hub, "user/tiny")) == {"notes.txt"}


# -- while it trains --------------------------------------------------------------------------------------------------


def train(recipe_file, text_file, folder, *flags) -> int:
    argv = ["train", "--recipe", recipe_file, "--data", text_file, "--output_dir", folder, "--push_to_hub", *flags]
    return main([str(word) for word in argv])


def test_a_training_pushes_a_whole_model_with_each_save_and_the_best_at_the_end(
    recipe_file, text_file, hub, tmp_path, capsys
):
    run = tmp_path / "run"
    flags = ["--hub_model_id", "tiny", "--hub_private_repo", "true", "--hub_always_push", "true", "--license", "mit"]
    assert train(recipe_file, text_file, run, *flags) == 0
    out = capsys.readouterr().out
    assert out.endswith(f"the model is in {run / 'model'}\n{hub.endpoint}/user/tiny\n")
    assert titles(hub, "user/tiny") == [
        "Upload model",
        *("Training in progress, step 40", "Training in progress, step 20", "initial commit"),
    ]
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}
    for commit, step in zip(hub.repository("user/tiny").history(), (40, 40, 20), strict=False):
        files = uploaded(hub, "user/tiny", commit["sha"])
        assert set(files) == MODEL
        about = json.loads(files["minigpt.json"])
        assert about["training"]["steps"] == step
        assert about["results"]["loss"] == pytest.approx(losses[step], rel=1e-12)
        card = ModelCard(files["README.md"].decode())
        assert ("It is still being trained" in card.text) == (step == 20)
        assert (card.data.license, card.data.model_name) == ("mit", "user/tiny")
        folder = tmp_path / commit["sha"]
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        assert model.config.use_cache is True
        tied = {model.config.tokenizer_fingerprint, about["tokenizer"]["fingerprint"], tokenizer_fingerprint(tokenizer)}
        assert len(tied) == 1
    weights = [commit["files"]["model.safetensors"]["oid"] for commit in hub.repository("user/tiny").history()[:3]]
    assert weights[0] == weights[1] != weights[2]
    assert list((run / ".pushing").iterdir()) == []
    assert "hub" not in (run / "recipe.yaml").read_text()


def test_a_hub_that_dies_while_it_trains_costs_a_line_and_no_step(recipe_file, text_file, hub, tmp_path, capsys):
    hub.fail("PUT", "/lfs/", "disconnect")
    run = tmp_path / "run"
    flags = ["--hub_model_id", "user/tiny", "--max_steps", "4", "--save_steps", "2", "--eval_steps", "2"]
    flags += ["--logging_steps", "2", "--warmup_steps", "2"]
    assert train(recipe_file, text_file, run, *flags) == 2
    captured = capsys.readouterr()
    assert "not pushed: user/tiny: the connection to" in captured.out
    assert captured.out.endswith(f"the model is in {run / 'model'}\n")
    assert re.search("^minigpt train: user/tiny: the connection to .*\n$", captured.err, re.MULTILINE)
    assert json.loads((run / "model" / "minigpt.json").read_text())["training"]["steps"] == 4
    assert set(uploaded(hub, "user/tiny")) == set()
    hub.faults.clear()
    assert push(capsys, run / "model", "--repo-id", "user/tiny")[0] == 0
    assert set(uploaded(hub, "user/tiny")) == MODEL


def test_a_training_that_may_not_push_says_so_before_the_first_step(recipe_file, text_file, hub, tmp_path, capsys):
    assert train(recipe_file, text_file, tmp_path / "run", "--hub_model_id", "other/tiny") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.search("^minigpt train: other/tiny: the Hub answered 403 .*\n$", captured.err, re.MULTILINE)


# -- the token --------------------------------------------------------------------------------------------------------


def test_the_token_is_in_no_file_log_card_or_upload(recipe_file, text_file, hub, tmp_path, capfd, monkeypatch):
    """All that a training with pushes, a push, failing ones and the clients leave behind is searched."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    flags = ["--hub_model_id", "user/tiny", "--max_steps", "2", "--save_steps", "1", "--eval_steps", "1"]
    assert train(recipe_file, text_file, tmp_path / "run", *flags) == 0
    model = AutoModelForCausalLM.from_pretrained("user/tiny")
    model.push_to_hub("user/alone")
    hub.fail("POST", "/commit/", 403)
    assert main(["push", str(tmp_path / "run" / "model"), "--repo-id", "user/again", "--native"]) == 2
    hub.fail("POST", "/repos/create", 401)
    assert main(["push", str(tmp_path / "run" / "model"), "--repo-id", "user/more"]) == 2
    assert main(["train", "--hub_token", TOKEN, "--output_dir", "refused"]) == 2
    captured = capfd.readouterr()
    assert "hub_token is not taken: log in once with `hf auth login`, or set HF_TOKEN" in captured.err

    hidden = TOKEN.encode()
    assert TOKEN not in captured.out + captured.err
    searched = 0
    for place in (tmp_path, hub.root, constants.HF_HOME):
        for folder, _, names in os.walk(place):
            for name in names:
                with open(os.path.join(folder, name), "rb") as file:  # noqa: PTH118, PTH123
                    searched += 1
                    assert hidden not in file.read(), name
    assert searched > 60
    carried = [request for request in hub.requests if TOKEN in str(request.headers)]
    assert carried
    for request in hub.requests:
        assert hidden not in request.body
        assert TOKEN not in request.path
        assert {name for name, value in request.headers.items() if TOKEN in value} <= {"Authorization", "authorization"}
        assert request not in carried or not request.path.startswith("/lfs/")
