"""`minigpt push --space` creates a demo next to the model, and overwrites no other program; `--collection` lists both."""

import ast
import re

import pytest
import yaml
from huggingface_hub import HfApi, SpaceCard

from minigpt_hf import doctor
from minigpt_hf.cli import main
from minigpt_hf.publish.space import GRADIO
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """Check files only, and retry without pauses."""
    monkeypatch.setattr(doctor, "examine", doctor.examine_files)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)


@pytest.fixture
def push(run_folder, capsys):
    """Run `minigpt push` of a model folder as `user/tiny`; return exit code, output and errors."""

    def push(*flags: str) -> tuple[int, str, str]:
        code = main(["push", str(run_folder / "model"), "--repo-id", "user/tiny", *flags])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return push


def model_urls(hub) -> str:
    return f"{hub.endpoint}/user/tiny\n{hub.endpoint}/user/tiny/tree/minigpt\n"


@pytest.mark.parametrize(("flags", "name"), [(["--space"], "user/tiny"), (["--space", "demo"], "user/demo")])
def test_a_space_is_created_in_the_same_command_and_linked_from_the_card(flags, name, push, hub):
    code, out, err = push(*flags)
    assert (code, out, err) == (0, f"{model_urls(hub)}{hub.endpoint}/spaces/{name}\n", "")
    files = hub.files(name, repo_type="spaces")
    assert set(files) == {".gitattributes", "README.md", "app.py", "requirements.txt"}
    card = SpaceCard.load(name)
    card.validate()  # asks the Hub
    assert (card.data.sdk, card.data.sdk_version, card.data.app_file) == ("gradio", GRADIO, "app.py")
    assert card.data.models == ["user/tiny"]
    ast.parse(files["app.py"])
    assert files["app.py"].count(b'\nMODEL = "user/tiny"\n') == 1
    assert re.fullmatch(r"torch==[\d.]+\ntransformers==[\d.]+\n", files["requirements.txt"].decode())
    assert f"https://huggingface.co/spaces/{name}" in hub.files("user/tiny")["README.md"].decode()
    assert push(*flags)[0] == 0  # updates the existing Space; nothing is new, so there is no commit
    assert [commit["title"] for commit in hub.repository(name, "spaces").history()] == ["Upload demo", "initial commit"]


def test_a_later_push_without_the_flag_keeps_the_link_to_the_space_of_the_same_name(push, hub):
    assert push()[0] == 0
    assert "spaces/" not in hub.files("user/tiny")["README.md"].decode()
    assert push("--space")[0] == push()[0] == 0
    assert "https://huggingface.co/spaces/user/tiny" in hub.files("user/tiny")["README.md"].decode()


@pytest.mark.parametrize(
    "card", [b"---\ntitle: x\nsdk: gradio\n---\n", b"---\nmodels: [user/big]\n---\n", b"---\n{: [\n---\n", b"", None]
)
def test_the_program_of_another_space_is_neither_overwritten_nor_linked(card, push, hub):
    files = {"app.py": b"mine"} | ({} if card is None else {"README.md": card})
    for name in ("user/other", "user/tiny"):
        hub.put(name, files, repo_type="spaces")
    code, out, err = push("--space", "user/other")
    assert (code, out) == (2, "")
    assert re.fullmatch("minigpt push: user/other: this Space is not a demo of user/tiny .*\n", err)
    assert hub.files("user/other", repo_type="spaces")["app.py"] == b"mine"
    assert set(hub.files("user/tiny")) == {".gitattributes"}  # created; nothing was uploaded
    assert push()[0] == 0
    assert "spaces/" not in hub.files("user/tiny")["README.md"].decode()


FAULTS = {
    "403 when the Space is created": ("POST", "/api/repos/create", 403),
    "403 at the commit": ("POST", "/api/spaces/.*/commit/", 403),
    "500 at the commit": ("POST", "/api/spaces/.*/commit/", 500),
    "connection lost during the commit": ("POST", "/api/spaces/.*/commit/", "disconnect"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_reported_in_one_line_and_leaves_the_space_as_it_was(fault, push, hub):
    method, path, effect = FAULTS[fault]
    hub.fail(method, path, effect)
    code, out, err = push("--space")
    assert (code, out, err.count("\n")) == (2, "", 1)
    if "created" in fault:
        with pytest.raises(Exception, match="does not exist"):
            hub.repository("user/tiny")
    else:
        assert f"{hub.endpoint}/user/tiny was updated before" in err
        assert set(hub.files("user/tiny", repo_type="spaces")) == {".gitattributes"}
    hub.faults.clear()
    assert push("--space")[0] == 0
    assert "app.py" in hub.files("user/tiny", repo_type="spaces")


def test_a_private_model_has_a_private_space_and_the_missing_token_is_reported(push, hub):
    code, _, err = push("--space", "--private")
    assert code == 0
    assert hub.repository("user/tiny", "spaces").private
    assert err == "user/tiny reads the private model with a token: store one as its secret HF_TOKEN\n"


def test_model_and_space_are_added_to_a_collection_by_title_and_by_slug(push, hub):
    code, out, err = push("--space", "--collection", "My models")
    slug = HfApi().create_collection("My models", exists_ok=True).slug
    assert (code, err) == (0, "")
    assert out.endswith(f"{hub.endpoint}/collections/{slug}\n")
    expected = [("user/tiny", "model"), ("user/tiny", "space")]
    assert [(item["id"], item["type"]) for item in hub.collection(slug)["items"]] == expected
    assert push("--space", "--collection", slug)[0] == 0  # already in it
    assert [(item["id"], item["type"]) for item in hub.collection(slug)["items"]] == expected


def test_a_missing_collection_is_reported_after_the_upload(push, hub):
    code, _, err = push("--collection", f"user/absent-{'0' * 24}")
    assert (code, err.count("\n")) == (2, 1)
    assert "the Hub answered 404" in err
    assert f"{hub.endpoint}/user/tiny was updated before" in err
    assert push("--collection", " ") == (2, "", "minigpt push: --collection is empty: give a title or a slug\n")


@pytest.mark.parametrize("name", ["a/b/c", "user/..", "-x"])
def test_an_invalid_name_of_a_space_is_rejected_before_anything_is_sent(name, push, hub):
    code, out, err = push(f"--space={name}")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert hub.requests == []


def test_the_pinned_version_of_gradio_is_the_tested_one():
    requirements = (ROOT / "tests" / "neighbours" / "requirements.txt").read_text()
    assert f"gradio=={GRADIO}\n" in requirements


def test_the_metadata_is_yaml_that_quotes_the_version(push, hub):
    """Unquoted, a version such as 6.10 would be read as the number 6.1."""
    assert push("--space")[0] == 0
    text = hub.files("user/tiny", repo_type="spaces")["README.md"].decode()
    assert isinstance(yaml.safe_load(text.split("---")[1])["sdk_version"], str)
