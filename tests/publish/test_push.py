"""A push is one commit that loads everywhere; errors are reported in one line; the token is never written."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, constants, login, snapshot_download
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from minigpt_hf import MiniGPTConfig, doctor
from minigpt_hf.cli import main
from minigpt_hf.data.tokenizer import tokenizer_fingerprint
from minigpt_hf.errors import MiniGPTError
from minigpt_hf.export.native import export_native
from minigpt_hf.inference.suites import TaskResult
from minigpt_hf.model.native import qwen3_settings
from minigpt_hf.publish.model_folder import CODE, REQUIRED, published_files, save_tasks, write_metadata
from minigpt_hf.publish.push import file_states, push_folder
from tests.conftest import random_ids, representative, tiny_model
from tests.hub_server import TOKEN, retry_without_pauses

FOLDER = {*REQUIRED, "figures/loss.png", "figures/training.png"}  # in the branch `minigpt`
MODEL = FOLDER - {*CODE}  # in `main`


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    retry_without_pauses(monkeypatch)


@pytest.fixture(autouse=True)
def file_checks_only(monkeypatch, request):
    """The complete examination of the doctor starts processes; only the test of it runs it."""
    if "doctor" not in request.node.name:
        monkeypatch.setattr(doctor, "examine", doctor.examine_files)


def test_a_folder_with_doctor_failures_is_not_pushed(run_folder, hub, tmp_path, capsys):
    """The weights are finite and well-formed but do not load, which only the complete examination finds."""
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


def native(folder) -> dict[str, bytes]:
    """The files of `main` of `user/tiny`, except for the card."""
    config = json.dumps(qwen3_settings(MiniGPTConfig.from_pretrained(folder)), indent=2) + "\n"
    files = {name: content for name, content in named(folder).items() if name not in CODE}
    return files | {"config.json": config.encode()}


def named(folder) -> dict[str, bytes]:
    """The files of a model folder with the name `user/tiny`."""
    metadata = {**json.loads((folder / "minigpt.json").read_text()), "name": "user/tiny"}
    return local(folder) | {"minigpt.json": (json.dumps(metadata, indent=2, ensure_ascii=False) + "\n").encode()}


def pushed(hub, repo_id: str) -> str:
    """The output of a successful push."""
    return f"{hub.endpoint}/{repo_id}\n{hub.endpoint}/{repo_id}/tree/minigpt\n"


def uploaded(hub, repo_id: str, revision: str = "main") -> dict[str, bytes]:
    files = hub.files(repo_id, revision)
    del files[".gitattributes"]
    return files


# -- content of the repository ------------------------------------------------------------------------------------------

IN_A_NEW_PROCESS = """
import json, re, sys
sys.modules["minigpt_hf"] = None  # importing it fails; the repository must load without it
import torch
from huggingface_hub import hf_hub_download
from transformers import AutoModelForCausalLM, AutoTokenizer

ids, expected, commits, alone = torch.load(sys.argv[1])
load = AutoModelForCausalLM.from_pretrained
code = {"trust_remote_code": True}
for where in ({}, {"revision": "old"}, {"revision": commits[0]}, {"revision": "minigpt", **code}):
    model = load("user/tiny", **where)
    assert type(model).__module__.startswith("transformers_modules" if code.items() <= where.items() else "transformers.")
    assert torch.equal(model(ids).logits, expected), where
    assert model.generation_config.temperature == 0.8
    tokenizer = AutoTokenizer.from_pretrained("user/tiny", **where)
    assert tokenizer.decode(tokenizer("def f(x):\\n").input_ids) == "def f(x):\\n"
assert torch.equal(load("user/tiny", revision="minigpt", code_revision=commits[1], **code)(ids).logits, expected)
with open(hf_hub_download("user/tiny", "README.md")) as card:
    snippets = re.findall(r"```python\\n(.*?)```", card.read(), re.DOTALL)
for snippet in snippets:
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


@pytest.mark.slow
def test_a_pushed_model_loads_in_a_new_process_at_every_revision(run_folder, hub, tmp_path, capsys):
    folder = run_folder / "model"
    assert push(capsys, folder, "--repo-id", "user/tiny", "--revision", "old")[0] == 0
    code, out, err = push(capsys, folder, "--repo-id", "user/tiny")
    assert (code, out, err) == (0, pushed(hub, "user/tiny"), "")
    assert titles(hub, "user/tiny") == titles(hub, "user/tiny", "minigpt") == ["Upload model", "initial commit"]
    cards = {branch: uploaded(hub, "user/tiny", branch)["README.md"] for branch in ("main", "old", "minigpt")}
    assert cards["main"] == cards["minigpt"] and b'revision="old"' in cards["old"]
    assert uploaded(hub, "user/tiny") == native(folder) | {"README.md": cards["main"]}
    old, about = uploaded(hub, "user/tiny", "old"), json.loads(native(folder)["minigpt.json"])
    assert json.loads(old["minigpt.json"]) == {**about, "hub_revision": "old"}
    assert old == native(folder) | {name: old[name] for name in ("README.md", "minigpt.json")}
    assert uploaded(hub, "user/tiny", "minigpt") == named(folder) | {"README.md": cards["minigpt"]}

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
    commits = [hub.repository("user/tiny").branches()[branch] for branch in ("main", "minigpt")]
    torch.save([ids, model(ids).logits, commits, alone], tmp_path / "expected.pt")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    hugging_face = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", IN_A_NEW_PROCESS, tmp_path / "expected.pt"],
        env={**environment, **hugging_face, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.endswith("all loaded\n"), done.stderr


def test_the_card_names_the_repository_unless_it_was_edited(run_folder, hub, tmp_path, caplog):
    push_folder(run_folder / "model", "user/tiny")
    assert "README.md" not in caplog.text
    card = uploaded(hub, "user/tiny")["README.md"].decode()
    assert 'pipeline("text-generation", model="user/tiny")' in card
    assert '.from_pretrained("user/tiny", revision="minigpt", trust_remote_code=True)' in card
    assert ModelCard(card).data.eval_results
    shutil.copytree(run_folder / "model", tmp_path / "model")
    mine = (tmp_path / "model" / "README.md").read_text() + "\nWritten manually.\n"
    (tmp_path / "model" / "README.md").write_text(mine)
    push_folder(tmp_path / "model", "user/tiny")
    assert uploaded(hub, "user/tiny")["README.md"].decode() == mine
    (warning,) = (record.getMessage() for record in caplog.records if "README.md" in record.getMessage())
    assert warning.endswith("its name, links and examples are not adapted to user/tiny")
    assert "has been edited, or written by another version" in warning


@pytest.mark.parametrize("revision", [None, "small"])
def test_a_card_that_was_edited_on_the_hub_and_is_replaced_is_reported(revision, run_folder, hub, tmp_path, caplog):
    branch = revision or "main"
    push_folder(run_folder / "model", "user/tiny", revision)
    card = uploaded(hub, "user/tiny", branch)["README.md"]
    push_folder(run_folder / "model", "user/tiny", revision)
    model = shutil.copytree(run_folder / "model", tmp_path / "model")
    save_tasks(model, [TaskResult("pairs", "1", "acc", "none", 0.618, None, 8, 0, None, "0.4.13").to_dict()])
    push_folder(model, "user/tiny", revision)
    assert "README.md" not in caplog.text
    api = HfApi()
    edited = card + b"\nWritten manually.\n"
    commit = api.upload_file(path_or_fileobj=edited, path_in_repo="README.md", repo_id="user/tiny", revision=branch).oid
    push_folder(model, "user/tiny", revision)
    (warning,) = (record.getMessage() for record in caplog.records if "README.md" in record.getMessage())
    assert f"README.md of the branch {branch} has been edited on the Hub" in warning
    assert warning.endswith(f"is replaced; the earlier one is in the commit {commit}")
    assert b"manually" not in uploaded(hub, "user/tiny", branch)["README.md"]


def test_a_card_that_was_on_the_hub_before_the_first_push_is_reported(run_folder, hub, caplog):
    HfApi().create_repo("user/tiny")
    hub.put("user/tiny", {"README.md": b"Written manually.\n"})
    push_folder(run_folder / "model", "user/tiny")
    assert "user/tiny: README.md of the branch main has been edited on the Hub" in caplog.text


def test_a_downloaded_card_with_a_demo_and_absent_datasets_is_not_taken_for_an_edited_one(
    run_folder, hub, tmp_path, caplog
):
    model, snapshot = shutil.copytree(run_folder / "model", tmp_path / "model"), tmp_path / "snapshot"
    metadata = json.loads((model / "minigpt.json").read_text())
    metadata["data"]["datasets"], metadata["recipe"]["init_from"] = ["user/plays", "user/absent"], "user/gone"
    hub.put("user/plays", {"train.txt": b"To be"}, repo_type="datasets")
    write_metadata(model, metadata, MiniGPTConfig.from_pretrained(model), None)
    push_folder(model, "user/tiny", space="user/demo")
    snapshot_download("user/tiny", revision="minigpt", local_dir=snapshot)
    save_tasks(snapshot, [TaskResult("pairs", "1", "acc", "none", 0.618, None, 8, 0, None, "0.4.13").to_dict()])
    card = (snapshot / "README.md").read_text()
    assert "| 0.6180 |" in card and "spaces/user/demo" in card and ModelCard(card).data.datasets == ["user/plays"]
    export_native(snapshot, tmp_path / "twin")
    assert (tmp_path / "twin" / "README.md").read_text() == card
    push_folder(snapshot, "user/other")
    other = uploaded(hub, "user/other")["README.md"].decode()
    assert "user/tiny" not in other and "user/demo" not in other and ModelCard(other).data.datasets == ["user/plays"]
    assert "README.md" not in caplog.text


def test_metadata_of_another_version_are_rejected_before_anything_is_created(run_folder, hub, tmp_path):
    folder = shutil.copytree(run_folder / "model", tmp_path / "model")
    metadata = json.loads((folder / "minigpt.json").read_text())
    del metadata["data"]["datasets"]
    (folder / "minigpt.json").write_text(json.dumps({**metadata, "minigpt_version": "0.1.0"}))
    with pytest.raises(MiniGPTError, match=r"no card can be rendered from minigpt.json .*another version .* \(0.1.0\)"):
        push_folder(folder, "user/tiny")
    assert not hub.requests


def test_only_model_files_are_uploaded_and_stale_ones_are_deleted(run_folder, hub, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(run_folder / "model", folder)
    for name in ("optimizer.pt", "notes.txt", ".env", "figures/secret.txt", "sub/config.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("private")
    old = {
        "model-00001-of-00001.safetensors": b"old",
        "model.safetensors.index.json": b"{}",
        ".eval_results/old.yaml": b"old",
    }
    hub.put(
        "user/tiny", {**old, "figures/other.png": b"theirs", "space.gguf": b"of another author", "notes.txt": b"theirs"}
    )
    push_folder(folder, "user/tiny")
    files = uploaded(hub, "user/tiny")
    assert set(files) == MODEL | {"space.gguf", "notes.txt", "figures/other.png"}
    assert files["notes.txt"] == b"theirs"
    assert titles(hub, "user/tiny") == ["Upload model", "put", "initial commit"]
    push_folder(folder, "user/tiny")  # nothing is new: no commit
    assert titles(hub, "user/tiny") == ["Upload model", "put", "initial commit"]


def test_files_that_would_change_how_the_model_loads_are_deleted_and_named(run_folder, hub, tmp_path, capsys):
    """transformers reads these if a repository has them, and would load another tokenizer or an adapter."""
    foreign = {
        "special_tokens_map.json": b'{"bos_token": "To"}',
        "added_tokens.json": b'{"To": 400}',
        "adapter_config.json": b"{}",
        "chat_templates/other.jinja": b"x",
        "custom_generate/generate.py": b"x",
    }
    hub.put("user/tiny", {**foreign, "notes.txt": b"theirs"})
    code, _, err = push(capsys, run_folder / "model", "--repo-id", "user/tiny")
    assert code == 0
    assert set(uploaded(hub, "user/tiny")) == MODEL | {"notes.txt"}
    for name in foreign:
        assert name in err


def test_a_folder_that_is_replaced_during_the_upload_of_the_weights_is_not_mixed_with_the_new_one(
    run_folder, hub, tmp_path
):
    folder = tmp_path / "model"
    shutil.copytree(run_folder / "model", folder)
    expected = {name: (folder / name).read_bytes() for name in ("generation_config.json", "tokenizer.json")}
    hub.fail("PUT", "/lfs/", "slow", 1)

    def replace():
        while not any(request.method == "PUT" and "/lfs/" in request.path for request in list(hub.requests)):
            threading.Event().wait(0.01)
        for name in expected:
            (folder / name).write_bytes(b"{}")

    replacing = threading.Thread(target=replace)
    replacing.start()
    push_folder(folder, "user/tiny", checked=file_states(folder))
    replacing.join()
    for files in (uploaded(hub, "user/tiny"), hub.files("user/tiny", "minigpt")):
        assert {name: files[name] for name in expected} == expected


@pytest.mark.parametrize("updated", [[], ["main"]], ids=["before the first commit", "between the commits"])
def test_weights_that_are_replaced_during_the_upload_are_not_published(updated, run_folder, hub, tmp_path, monkeypatch):
    """Metadata and card were read before, and describe other weights."""
    folder = tmp_path / "model"
    shutil.copytree(run_folder / "model", folder)
    original = (folder / "model.safetensors").read_bytes()
    wait_for = "create_commit" if updated else "preupload_lfs_files"
    replaced = getattr(HfApi, wait_for)

    def replace(*args, **options):
        result = replaced(*args, **options)
        (folder / "new").write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
        (folder / "new").replace(folder / "model.safetensors")
        return result

    monkeypatch.setattr(HfApi, wait_for, replace)
    with pytest.raises(MiniGPTError, match="has changed since it was checked") as error:
        push_folder(folder, "user/tiny", checked=file_states(folder))
    assert ("user/tiny was updated before" in str(error.value)) == bool(updated)
    branches = {"main": uploaded(hub, "user/tiny"), "minigpt": hub.files("user/tiny", "minigpt")}
    with_weights = {name: files for name, files in branches.items() if "model.safetensors" in files}
    assert {name: files["model.safetensors"] for name, files in with_weights.items()} == dict.fromkeys(
        updated, original
    )


def test_a_failure_of_the_second_branch_names_the_branch_that_was_updated(run_folder, hub, capsys):
    hub.fail("POST", "/commit/minigpt", 400)
    code, _, err = push(capsys, run_folder / "model", "--repo-id", "user/tiny")
    assert code == 2
    assert re.fullmatch(
        f"minigpt push: user/tiny: the Hub answered 400.*{hub.endpoint}/user/tiny was updated before\n", err
    )
    assert "nothing was changed" not in err
    assert set(uploaded(hub, "user/tiny")) == MODEL


def test_an_interrupt_states_what_was_updated_before(hub, run_folder, monkeypatch, capsys):
    commit = HfApi.create_commit

    def interrupted(self, *arguments, revision, **keywords):
        if revision == "minigpt":
            raise KeyboardInterrupt
        return commit(self, *arguments, revision=revision, **keywords)

    monkeypatch.setattr(HfApi, "create_commit", interrupted)
    assert main(["push", str(run_folder / "model"), "--repo-id", "user/tiny"]) == 130
    assert capsys.readouterr().err == f"minigpt push: interrupted; {hub.endpoint}/user/tiny was updated before\n"


def test_shards_are_uploaded_with_their_index(run_folder, hub, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(run_folder / "model", folder)
    (folder / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(run_folder / "model").save_pretrained(folder, max_shard_size="60KB")
    shards = {file.name for file in folder.glob("model-*.safetensors")}
    assert len(shards) > 1
    push_folder(run_folder / "model", "user/tiny")
    push_folder(folder, "user/tiny")
    assert set(uploaded(hub, "user/tiny")) == MODEL - {"model.safetensors"} | shards | {"model.safetensors.index.json"}


def test_exactly_the_shards_of_the_index_are_uploaded(run_folder, hub, tmp_path, caplog):
    """Shards may have any name; other weights are reported, and `minigpt push` rejects a folder that has them."""
    folder = tmp_path / "model"
    shutil.copytree(run_folder / "model", folder)
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    names = load_file(folder / "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(names, "part.safetensors")})
    )
    (folder / "model-00001-of-00001.safetensors").write_bytes(b"stray")
    push_folder(folder, "user/tiny")
    weights = {"part.safetensors", "model.safetensors.index.json"}
    assert set(uploaded(hub, "user/tiny")) == MODEL - {"model.safetensors"} | weights
    name = "model-00001-of-00001.safetensors"
    assert f"{folder}: not uploaded, because the model does not load them: {name}" in caplog.messages


def test_an_index_that_names_files_outside_the_folder_is_not_followed(run_folder, hub, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(run_folder / "model", folder)
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../outside.safetensors"}}')
    with pytest.raises(ValueError, match="names files outside the folder"):
        push_folder(folder, "user/tiny")
    assert not any(request.path.startswith("/api/repos/create") for request in hub.requests)


def test_a_private_repository_is_private_or_rejected(run_folder, hub, capsys):
    assert push(capsys, run_folder / "model", "--repo-id", "user/hidden", "--private")[0] == 0
    assert hub.repository("user/hidden").private
    assert push(capsys, run_folder / "model", "--repo-id", "user/open")[0] == 0
    code, _, err = push(capsys, run_folder / "model", "--repo-id", "user/open", "--private")
    assert (code, err.count("\n")) == (2, 1)
    assert "user/open: exists and is public" in err


def test_a_stored_login_suffices(run_folder, hub, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    for name in ("HF_TOKEN_PATH", "HF_STORED_TOKENS_PATH"):
        monkeypatch.setattr(constants, name, str(tmp_path / name))
    login(TOKEN)
    capsys.readouterr()
    assert push(capsys, run_folder / "model", "--repo-id", "user/tiny")[0] == 0


# -- rejected before anything is sent ------------------------------------------------------------------------------------


def test_an_invalid_push_is_reported_in_one_line_and_sends_nothing(run_folder, hub, tmp_path, capsys, monkeypatch):
    half, linked, twin = tmp_path / "half", tmp_path / "linked", tmp_path / "twin"
    for folder in (half, linked, twin):
        shutil.copytree(run_folder / "model", folder)
    for file in twin.glob("*.py"):
        file.unlink()
    (half / "tokenizer.json").unlink()
    (linked / "README.md").unlink()
    (linked / "README.md").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").write_text("private")
    model = run_folder / "model"
    cases = [
        ([half, "--repo-id", "user/tiny"], "half: not a model folder: tokenizer.json missing"),
        (
            [twin, "--repo-id", "user/tiny"],
            "missing; of a downloaded model, give the branch minigpt, which contains them",
        ),
        ([tmp_path / "absent", "--repo-id", "user/tiny"], "absent: no such folder; give a model folder"),
        ([run_folder, "--repo-id", "user/tiny"], "this is a run folder; its model folder is"),
        ([linked, "--repo-id", "user/tiny"], r"README\.md: is a link"),
        ([model, "--repo-id", "user/tiny", "--revision", "minigpt"], "the branch minigpt holds the code"),
        ([model, "--repo-id", "user/tiny", "--revision", "refs/heads/minigpt"], "is not the name of a branch"),
        ([model, "--repo-id", "user/tiny", "--revision", "main "], "is not the name of a branch"),
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
        "minigpt push: no token for the Hub was found: log in with `hf auth login`, or set HF_TOKEN\n",
    )
    assert hub.requests == []


# -- failures ------------------------------------------------------------------------------------------------------------

FAULTS = {
    "401 to all": ("POST", "/api/", 401, "answered 401 .*log in again with `hf auth login`"),
    "403 to all": ("POST", "/api/", 403, "answered 403 .*the token has no write permission"),
    "403 at the commit": ("POST", "/commit/", 403, "answered 403 .*the token has no write permission"),
    "404 before the upload": ("POST", "/preupload/", 404, "answered 404 .*the repository or branch does not exist"),
    "409 at the commit": ("POST", "/commit/", 409, "answered 409 .*another change of the repository is in progress"),
    "412 at the commit": ("POST", "/commit/", 412, "answered 412 .*has received another commit"),
    "429 before the upload": ("POST", "/preupload/", 429, "answered 429 .*too many requests"),
    "429 at the commit": ("POST", "/commit/", 429, "answered 429 .*too many requests"),
    "500 in the storage": ("PUT", "/lfs/", 500, "answered 500 .*try again later"),
    "500 at the commit": ("POST", "/commit/", 500, "answered 500 .*try again later"),
    "503 at the card": ("POST", "/validate-yaml", 503, "answered 503 .*try again later"),
    "connection lost during the weights": ("PUT", "/lfs/", "disconnect", "the connection to .* was lost"),
    "connection lost during the commit": ("POST", "/commit/", "disconnect", "the connection to .* was lost"),
    "connection lost at the first request": ("POST", "/repos/create", "disconnect", "the connection to .* was lost"),
    "answer lost": ("POST", "/commit/", "lost", "the connection to .* was lost.*the repository is consistent"),
}


@pytest.mark.parametrize("fault", representative(FAULTS, "412 at the commit", "500 in the storage", "answer lost"))
def test_a_failure_is_reported_in_one_line_and_leaves_main_consistent_and_a_retry_succeeds(
    fault, run_folder, hub, tmp_path, capsys
):
    earlier = tmp_path / "earlier"
    shutil.copytree(run_folder / "model", earlier)
    tiny_model(vocab_size=300).save_pretrained(earlier)
    push_folder(earlier, "user/tiny")
    before = uploaded(hub, "user/tiny")
    now = native(run_folder / "model") | {"README.md": before["README.md"]}
    assert before["model.safetensors"] != now["model.safetensors"]

    method, path, kind, message = FAULTS[fault]
    hub.fail(method, path, kind)
    code, out, err = push(capsys, run_folder / "model", "--repo-id", "user/tiny")
    assert (code, out) == (2, "")
    assert re.fullmatch(f"minigpt push: user/tiny: .*{message}.*\n", err), err
    hub.faults.clear()
    assert uploaded(hub, "user/tiny") == (now if kind == "lost" else before)
    code, out, err = push(capsys, run_folder / "model", "--repo-id", "user/tiny")
    assert (code, out, err) == (0, pushed(hub, "user/tiny"), "")
    assert uploaded(hub, "user/tiny") == now
    assert titles(hub, "user/tiny") == ["Upload model", "Upload model", "initial commit"]


def test_temporary_failures_and_slow_answers_are_retried(run_folder, hub, capsys):
    hub.fail("PUT", "/lfs/", 500, times=2)
    hub.fail("POST", "/preupload/", 429, times=1)
    hub.fail("POST", "/commit/", "slow", times=1)
    code, out, err = push(capsys, run_folder / "model", "--repo-id", "user/tiny")
    assert (code, out, err) == (0, pushed(hub, "user/tiny"), "")
    assert set(uploaded(hub, "user/tiny")) == MODEL


def test_a_concurrent_commit_is_not_overwritten(run_folder, hub, monkeypatch):
    """Another commit arrives between reading the branch and committing: the Hub rejects the outdated parent commit."""
    from huggingface_hub import HfApi

    preupload = HfApi.preupload_lfs_files

    def meanwhile(self, *args, **kwargs):
        hub.put("user/tiny", {"notes.txt": b"theirs"})
        return preupload(self, *args, **kwargs)

    monkeypatch.setattr(HfApi, "preupload_lfs_files", meanwhile)
    with pytest.raises(OSError, match=r"answered 412 \(A commit has happened since.*try again"):
        push_folder(run_folder / "model", "user/tiny")
    assert set(uploaded(hub, "user/tiny")) == {"notes.txt"}


def test_of_two_concurrent_pushes_one_fails_so_that_both_branches_hold_one_model(
    run_folder, hub, tmp_path, capsys, monkeypatch
):
    """The second push is complete between the two commits of the first one."""
    from huggingface_hub import HfApi

    other = tmp_path / "model"
    shutil.copytree(run_folder / "model", other)
    model = AutoModelForCausalLM.from_pretrained(other)
    model.model.norm.weight.data += 1
    model.save_pretrained(other)
    create, urls = HfApi.create_commit, []

    def create_and_meanwhile(self, *args, **kwargs):
        result = create(self, *args, **kwargs)
        if not urls:
            urls.append("in progress")
            urls[:] = push_folder(other, "user/tiny")
        return result

    push_folder(run_folder / "model", "user/tiny")  # both branches exist
    monkeypatch.setattr(HfApi, "create_commit", create_and_meanwhile)
    changed = tmp_path / "changed"
    shutil.copytree(run_folder / "model", changed)
    model.model.norm.weight.data += 1
    model.save_pretrained(changed)
    about = json.loads((changed / "minigpt.json").read_text())
    del about["weights"]  # of the original model
    (changed / "minigpt.json").write_text(json.dumps(about))
    code, _, err = push(capsys, changed, "--repo-id", "user/tiny")
    assert code == 2
    assert re.match(r"minigpt push: user/tiny: the Hub answered 412 .*try again", err.splitlines()[-1])
    weights = [hub.files("user/tiny", branch)["model.safetensors"] for branch in ("main", "minigpt")]
    assert weights == [(other / "model.safetensors").read_bytes()] * 2


def test_the_card_of_another_branch_loads_that_branch(run_folder, hub, tmp_path, capsys):
    """The repository has another model in `main`, and no other branch."""
    hub.put("user/tiny", {"config.json": b"{}"})
    assert push(capsys, run_folder / "model", "--repo-id", "user/tiny", "--revision", "v2")[0] == 0
    card = hub.files("user/tiny", "v2")["README.md"].decode()
    assert "minigpt`]" not in card and "blob/minigpt" not in card
    (example,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names: dict = {}
    exec(example, names)
    loaded, expected = names["generator"].model.state_dict(), load_file(run_folder / "model" / "model.safetensors")
    assert all(torch.equal(loaded[name], weight) for name, weight in expected.items())
    assert "hf download user/tiny --revision v2 --local-dir tiny\nminigpt generate tiny" in card


# -- during training ----------------------------------------------------------------------------------------------------


def train(recipe_file, text_file, folder, *flags) -> int:
    argv = ["train", "--recipe", recipe_file, "--data", text_file, "--output_dir", folder, "--push_to_hub"]
    return main([str(word) for word in [*argv, *flags]])


def test_training_pushes_a_complete_model_with_each_checkpoint_and_the_best_at_the_end(
    recipe_file, text_file, hub, tmp_path, capsys
):
    run = tmp_path / "run"
    flags = "--hub_model_id tiny --hub_private_repo true --hub_always_push true --license mit --figures".split()
    flags += "--max_steps 4 --save_steps 2 --eval_steps 2 --warmup_steps 2".split()
    assert train(recipe_file, text_file, run, *flags) == 0
    out = capsys.readouterr().out
    assert out.endswith(f"the model is in {run / 'model'}\n{pushed(hub, 'user/tiny')}")
    assert hub.repository("user/tiny").private
    assert titles(hub, "user/tiny") == [
        "Upload model",
        *("Training in progress, step 4", "Training in progress, step 2", "initial commit"),
    ]
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}
    for commit, step in zip(hub.repository("user/tiny").history(), (4, 4, 2), strict=False):
        files = uploaded(hub, "user/tiny", commit["sha"])
        assert set(files) == MODEL
        metadata = json.loads(files["minigpt.json"])
        assert metadata["training"]["steps"] == step
        assert metadata["results"]["loss"] == pytest.approx(losses[step], rel=1e-12)
        card = ModelCard(files["README.md"].decode())
        assert ("Training is in progress" in card.text) == (step == 2)
        assert (card.data.license, card.data.model_name) == ("mit", "user/tiny")
        folder = tmp_path / commit["sha"]
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        assert model.config.use_cache is True
        tied = {
            model.config.tokenizer_fingerprint,
            metadata["tokenizer"]["fingerprint"],
            tokenizer_fingerprint(tokenizer),
        }
        assert len(tied) == 1
    weights = [commit["files"]["model.safetensors"]["oid"] for commit in hub.repository("user/tiny").history()[:3]]
    assert weights[0] == weights[1] != weights[2]
    assert list((run / ".pushing").iterdir()) == []
    assert "hub" not in (run / "recipe.yaml").read_text()


def test_a_failed_push_during_training_is_logged_and_training_continues(recipe_file, text_file, hub, tmp_path, capsys):
    hub.fail("PUT", "/lfs/", "disconnect")
    run = tmp_path / "run"
    flags = ["--hub_model_id", "user/tiny", "--max_steps", "4", "--save_steps", "2", "--eval_steps", "2"]
    flags += ["--logging_steps", "2", "--warmup_steps", "2", "--figures"]
    assert train(recipe_file, text_file, run, *flags) == 2
    captured = capsys.readouterr()
    assert "not pushed: user/tiny: the connection to" in captured.err
    assert captured.out.endswith(f"the model is in {run / 'model'}\n")
    assert re.search("^minigpt train: user/tiny: the connection to .*\n$", captured.err, re.MULTILINE)
    assert json.loads((run / "model" / "minigpt.json").read_text())["training"]["steps"] == 4
    assert set(uploaded(hub, "user/tiny")) == set()

    # The message advises to run the same command again: it pushes the finished model.
    assert "run the same command again" in captured.err
    assert train(recipe_file, text_file, run, *flags) == 2
    assert "already finished" in (err := capsys.readouterr().err) and "user/tiny: the connection to" in err
    hub.faults.clear()
    assert train(recipe_file, text_file, run, *flags) == 0
    assert pushed(hub, "user/tiny") in capsys.readouterr().err
    assert set(uploaded(hub, "user/tiny")) == MODEL


def test_the_card_of_a_run_that_pushes_to_a_branch_names_the_branch(recipe_file, text_file, hub, tmp_path, caplog):
    """The local card and a native export of the folder, too; after a push to `main`, card and metadata name no branch."""
    folder = tmp_path / "run" / "model"
    flags = ["--hub_model_id", "user/tiny", "--hub_revision", "dev", "--max_steps", "2", "--hub_strategy", "end"]
    assert train(recipe_file, text_file, tmp_path / "run", *flags) == 0
    card = (folder / "README.md").read_text()
    assert 'model="user/tiny", revision="dev")' in card and 'revision="minigpt"' not in card
    files = uploaded(hub, "user/tiny", "dev")
    for name in ("README.md", "minigpt.json"):
        assert files[name].decode() == (folder / name).read_text()
    assert main(["export", str(folder), "--to", "native", "--output_dir", str(tmp_path / "native")]) == 0
    assert (tmp_path / "native" / "README.md").read_text() == card
    push_folder(folder, "user/other")
    files = uploaded(hub, "user/other")
    assert 'model="user/other")' in files["README.md"].decode() and "hub_revision" not in json.loads(
        files["minigpt.json"]
    )
    assert "README.md" not in caplog.text


def test_missing_write_permission_is_reported_before_the_first_step(recipe_file, text_file, hub, tmp_path, capsys):
    assert train(recipe_file, text_file, tmp_path / "run", "--hub_model_id", "other/tiny") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.search("^minigpt train: other/tiny: the Hub answered 403 .*\n$", captured.err, re.MULTILINE)
    flags = ("--hub_model_id", "user/tiny", "--hub_revision", "minigpt")
    assert train(recipe_file, text_file, tmp_path / "other", *flags) == 2
    assert "the branch minigpt holds the code" in capsys.readouterr().err


# -- the token --------------------------------------------------------------------------------------------------------


def test_the_token_is_in_no_file_log_card_or_upload(recipe_file, text_file, hub, tmp_path, capfd, monkeypatch):
    """Searches every file, output and request of a training run with pushes, and of successful and failed pushes."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    flags = ["--hub_model_id", "user/tiny", "--max_steps", "2", "--save_steps", "1", "--eval_steps", "1"]
    assert train(recipe_file, text_file, tmp_path / "run", *flags) == 0
    model = AutoModelForCausalLM.from_pretrained("user/tiny")
    model.push_to_hub("user/alone")
    hub.fail("POST", "/commit/", 403)
    assert main(["push", str(tmp_path / "run" / "model"), "--repo-id", "user/again"]) == 2
    hub.fail("POST", "/repos/create", 401)
    assert main(["push", str(tmp_path / "run" / "model"), "--repo-id", "user/more"]) == 2
    assert main(["train", "--hub_token", TOKEN, "--output_dir", "refused"]) == 2
    captured = capfd.readouterr()
    assert "hub_token is not accepted: log in with `hf auth login`, or set HF_TOKEN" in captured.err

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
