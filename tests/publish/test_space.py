"""`minigpt push --space` creates a demo next to the model, and overwrites no other program; `--collection` lists both."""

import ast
import json
import re
import runpy
import shutil

import pytest
import yaml
from huggingface_hub import HfApi, SpaceCard

from minigpt_hf import doctor, generate
from minigpt_hf.cli import main
from minigpt_hf.export import html
from minigpt_hf.publish.push import push_folder
from minigpt_hf.publish.space import GRADIO
from tests import hub_server
from tests.conftest import ROOT, representative
from tests.hub_server import retry_without_pauses

uncached_page = html.demo_page
TEMPLATE = (  # an answer follows "assistant:" and ends with the EOS token
    "{% for message in messages %}{{ message.role }}:{{ message.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
PAGE = {"index.html"}
PROGRAM = {"app.py", "requirements.txt"}
PAGES: dict = {}
MEASURED = r"weights in float\d\d: the logits differ by at most \S+, and \d+ of 20 greedy continuations are equal\n"


def demo_page(folder, name: str) -> str | None:
    """The page, computed once, because measuring its weights takes most of the time of a push. A missing one is logged."""
    if (folder, name) not in PAGES and (page := uncached_page(folder, name)):
        PAGES[folder, name] = page
    return PAGES.get((folder, name))


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """Check files only, measure each page once, and retry without pauses."""
    monkeypatch.setattr(doctor, "examine", doctor.examine_files)
    monkeypatch.setattr(html, "demo_page", demo_page)
    retry_without_pauses(monkeypatch)


@pytest.fixture(scope="session")
def with_template(run_folder, tmp_path_factory):
    """A model folder with a chat template that the page cannot represent."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(run_folder / "model", folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return folder


@pytest.fixture
def push(run_folder, capsys):
    """Run `minigpt push` of a model folder as `user/tiny`; return exit code, output and errors."""

    def push(*flags: str, folder=run_folder / "model") -> tuple[int, str, str]:
        code = main(["push", str(folder), "--repo-id", "user/tiny", *flags])
        captured = capsys.readouterr()
        return code, captured.out, re.sub(MEASURED, "", captured.err)

    return push


def model_urls(hub) -> str:
    return f"{hub.endpoint}/user/tiny\n{hub.endpoint}/user/tiny/tree/minigpt\n"


def demo(hub, name: str = "user/tiny") -> dict[str, bytes]:
    """The files of a Space, without those that every Space has."""
    files = hub.files(name, repo_type="spaces")
    return {path: content for path, content in files.items() if path not in (".gitattributes", "README.md")}


def titles(hub, name: str) -> list[str]:
    return [commit["title"] for commit in hub.repository(name, "spaces").history()]


@pytest.mark.parametrize(
    ("flags", "name"),
    representative([(["--space"], "user/tiny"), (["--space", "demo"], "user/demo")], (["--space"], "user/tiny")),
)
def test_a_space_with_the_page_is_created_in_the_same_command_and_linked_from_the_card(
    flags, name, push, hub, run_folder
):
    code, out, err = push(*flags)
    assert (code, out, err) == (0, f"{model_urls(hub)}{hub.endpoint}/spaces/{name}\n", "")
    assert demo(hub, name) == {"index.html": demo_page(run_folder / "model", "user/tiny").encode()}
    assert b'"name": "user/tiny"' in demo(hub, name)["index.html"]
    card = SpaceCard.load(name)
    card.validate()  # asks the Hub
    assert (card.data.sdk, card.data.app_file, card.data.models) == ("static", "index.html", ["user/tiny"])
    assert f"https://huggingface.co/spaces/{name}" in hub.files("user/tiny")["README.md"].decode()
    assert push(*flags)[0] == 0  # updates the existing Space; nothing is new, so there is no commit
    assert titles(hub, name) == ["Upload demo", "initial commit"]


def test_a_model_that_does_not_fit_into_a_page_gets_a_program(push, hub, with_template):
    code, out, err = push("--space", folder=with_template)
    assert (code, out) == (0, f"{model_urls(hub)}{hub.endpoint}/spaces/user/tiny\n")
    assert err == "the Space runs a program on a server instead of a page: its chat template is not ChatML\n"
    files = demo(hub)
    assert set(files) == PROGRAM
    card = SpaceCard.load("user/tiny")
    card.validate()  # asks the Hub
    assert (card.data.sdk, card.data.sdk_version, card.data.app_file) == ("gradio", GRADIO, "app.py")
    assert card.data.models == ["user/tiny"]
    ast.parse(files["app.py"])
    assert files["app.py"].count(b'\nMODEL = "user/tiny"\n') == 1
    assert re.fullmatch(r"torch==[\d.]+\ntransformers==[\d.]+\n", files["requirements.txt"].decode())
    assert push("--space", folder=with_template)[0] == 0
    assert titles(hub, "user/tiny") == ["Upload demo", "initial commit"]


def test_the_program_starts_conversations_with_the_system_message_of_training(push, hub, with_template, tmp_path):
    folder, system = tmp_path / "model", 'Say "yes" \\o/ \U0001f600\nor no.'
    shutil.copytree(with_template, folder)
    metadata = json.loads((folder / "minigpt.json").read_text())
    metadata["recipe"]["system"] = system
    (folder / "minigpt.json").write_text(json.dumps(metadata))
    assert push("--space", folder=folder)[0] == 0
    statements = [node for node in ast.parse(demo(hub)["app.py"]).body if isinstance(node, ast.Assign)]
    assert {node.targets[0].id: ast.literal_eval(node.value) for node in statements[:3]} == {
        "MODEL": "user/tiny",
        "REVISION": "main",
        "SYSTEM": system,
    }


@pytest.mark.parametrize(("branch", "path"), [("v2", "v2"), ("rel/1.0", "rel%2F1.0")])
def test_the_program_of_another_branch_loads_that_branch(branch, path, push, hub, with_template):
    code, out, _ = push("--space", "--revision", branch, folder=with_template)
    assert code == 0 and f"/user/tiny/tree/{path}\n" in out
    program = demo(hub)["app.py"].decode()
    assert program.count(f'\nMODEL = "user/tiny"\nREVISION = "{branch}"\n') == 1
    assert f"https://huggingface.co/user/tiny/tree/{path})" in SpaceCard.load("user/tiny").text
    assert push()[0] == 0  # the Space demonstrates another branch; the card of `main` must not say that it is its demo
    assert "spaces/" not in hub.files("user/tiny")["README.md"].decode()
    assert push("--revision", branch)[0] == 0
    assert "spaces/user/tiny" in hub.files("user/tiny", branch)["README.md"].decode()


def test_the_program_continues_a_text_without_tokens_that_the_tokenizer_appends(hub, run_folder, tmp_path):
    pytest.importorskip("gradio")
    folder = shutil.copytree(run_folder / "model", tmp_path / "model")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<|pad|>", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|pad|>": {"id": "<|pad|>", "ids": [1], "tokens": ["<|pad|>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    push_folder(folder, "user/tiny", space="user/tiny")
    program = tmp_path / "app.py"
    program.write_bytes(demo(hub)["app.py"])
    functions = runpy.run_path(str(program))
    assert functions["encode"]("def f", add_special_tokens=True) == functions["encode"]("def f")
    *_, text = functions["continue_text"]("def f", 8, 0)
    assert text == generate(folder, "def f", max_new_tokens=8, do_sample=False)[0]


@pytest.mark.parametrize(("bytes_per_parameter", "files"), [(1.9, PROGRAM), (2.1, PAGE)])
def test_the_page_needs_weights_below_the_limit_in_float16(
    bytes_per_parameter, files, push, hub, run_folder, monkeypatch
):
    """Below four bytes per parameter, float16 is used even if it changes a greedy continuation."""
    weights = (run_folder / "model" / "model.safetensors").stat().st_size / 4e6  # MB with one byte per parameter
    monkeypatch.setattr(html, "MAX_MEGABYTES", round(bytes_per_parameter * weights, 4))
    monkeypatch.setattr(html, "demo_page", uncached_page)
    code, _, err = push("--space")
    assert code == 0
    assert set(demo(hub)) == files
    if files == PROGRAM:
        pattern = (
            "the Space runs a program on a server .*: its weights need .* MB in float16, and a page holds at most .*\n"
        )
        assert re.fullmatch(pattern, err)


@pytest.mark.parametrize("name", ["README.md", "app.py", "index.html"])
def test_a_file_of_the_space_that_was_edited_on_the_hub_and_is_replaced_is_reported(
    name, push, hub, with_template, run_folder
):
    folder = run_folder / "model" if name == "index.html" else with_template
    push("--space", folder=folder)
    HfApi().upload_file(path_or_fileobj=b"mine", path_in_repo="notes.txt", repo_id="user/tiny", repo_type="space")
    assert "edited" not in push("--space", folder=folder)[2]
    edited = hub.files("user/tiny", repo_type="spaces")[name] + b"\n"
    commit = HfApi().upload_file(path_or_fileobj=edited, path_in_repo=name, repo_id="user/tiny", repo_type="space")
    code, _, errors = push("--space", folder=folder)
    assert code == 0
    assert f"user/tiny: {name} of the Space has been edited on the Hub, and is replaced" in errors
    assert f"the earlier one is in the commit {commit.oid}" in errors
    assert hub.files("user/tiny", repo_type="spaces")[name] != edited
    assert "edited" not in push("--space", folder=folder)[2]


def test_page_and_program_replace_each_other_in_one_commit(push, hub, with_template, run_folder):
    for folder, files in ((with_template, PROGRAM), (run_folder / "model", PAGE), (with_template, PROGRAM)):
        assert push("--space", folder=folder)[0] == 0
        assert set(demo(hub)) == files
        assert SpaceCard.load("user/tiny").data.sdk == ("static" if files == PAGE else "gradio")
    assert titles(hub, "user/tiny") == ["Upload demo"] * 3 + ["initial commit"]


def test_a_later_push_without_the_flag_keeps_the_link_to_the_space_of_the_same_name(push, hub):
    assert push()[0] == 0
    assert "spaces/" not in hub.files("user/tiny")["README.md"].decode()
    for flags, warned in ((("--space",), False), ((), True)):
        code, _, errors = push(*flags)
        assert code == 0
        assert ("the demo in the Space user/tiny is not changed; --space updates it" in errors) == warned
    assert "https://huggingface.co/spaces/user/tiny" in hub.files("user/tiny")["README.md"].decode()


def test_a_later_push_keeps_the_link_to_a_space_of_another_name(push, hub):
    assert push("--space", "demo")[0] == 0
    code, _, errors = push()
    assert (code, errors) == (0, "the demo in the Space user/demo is not changed; --space user/demo updates it\n")
    assert "https://huggingface.co/spaces/user/demo" in hub.files("user/tiny")["README.md"].decode()


def test_a_card_that_links_the_demo_of_another_branch_is_reported(push, hub):
    assert push("--space")[0] == 0
    code, _, errors = push("--space", "--revision", "v2")
    assert code == 0
    assert (
        "the card of the branch main still links the Space user/tiny, which is the demo of the branch v2 now" in errors
    )
    assert push()[0] == 0
    assert "spaces/" not in hub.files("user/tiny")["README.md"].decode()
    assert push("--space", "--revision", "v2")[::2] == (0, "")


FOREIGN = [b"---\ntitle: x\nsdk: gradio\n---\n", b"---\nmodels: [user/big]\n---\n", b"---\n{: [\n---\n", b"", None]


@pytest.mark.parametrize("card", representative(FOREIGN, *FOREIGN[:1]))
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


@pytest.mark.parametrize("kind", ["page", "program"])
@pytest.mark.parametrize("fault", representative(FAULTS, "connection lost during the commit"))
def test_a_fault_is_reported_in_one_line_and_leaves_the_space_as_it_was(
    fault, kind, push, hub, run_folder, with_template
):
    folder = run_folder / "model" if kind == "page" else with_template
    method, path, effect = FAULTS[fault]
    hub.fail(method, path, effect)
    code, out, err = push("--space", folder=folder)
    err = re.sub("the Space runs a program .*\n", "", err)
    assert (code, out, err.count("\n")) == (2, "", 1)
    if "created" in fault:
        with pytest.raises(Exception, match="does not exist"):
            hub.repository("user/tiny")
    else:
        assert f"{hub.endpoint}/user/tiny was updated before" in err
        assert set(hub.files("user/tiny", repo_type="spaces")) == {".gitattributes"}
    hub.faults.clear()
    assert push("--space", folder=folder)[0] == 0
    assert set(demo(hub)) == (PAGE if kind == "page" else PROGRAM)


@pytest.mark.parametrize("effect", [500, pytest.param("disconnect", marks=pytest.mark.slow)])
def test_a_large_page_is_uploaded_to_the_storage_before_its_commit(effect, push, hub, monkeypatch):
    """As weights are; the Space is not changed if that fails, and the model is complete."""
    monkeypatch.setattr(hub_server, "LARGE", 10_000)
    assert push()[0] == 0
    hub.fail("PUT", "/lfs/", effect)
    code, out, err = push("--space")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"{hub.endpoint}/user/tiny was updated before" in err
    assert demo(hub) == {}
    assert "model.safetensors" in hub.files("user/tiny")
    hub.faults.clear()
    assert push("--space")[0] == 0
    assert hub.repository("user/tiny", "spaces").read("main")["files"]["index.html"]["lfs"]


@pytest.mark.parametrize("flags", representative([["--space", "--private"], ["--space"]], ["--space"]))
def test_the_space_of_a_private_model_is_private_and_contains_its_page(flags, push, hub):
    """Also if the repository existed and the flag is not repeated: the page contains the weights."""
    assert push("--private")[0] == 0
    assert push(*flags)[::2] == (0, "")
    assert hub.repository("user/tiny", "spaces").private
    assert set(demo(hub)) == PAGE


def test_a_program_that_reads_a_private_model_needs_a_token(push, hub, with_template):
    code, _, err = push("--space", "--private", folder=with_template)
    assert code == 0
    assert err.endswith("user/tiny reads the private model with a token: store one as its secret HF_TOKEN\n")


def test_the_page_of_a_private_model_is_not_written_to_a_public_space(push, hub):
    hub.put("user/demo", {"README.md": b"---\nmodels: [user/tiny]\n---\n"}, repo_type="spaces")
    assert push("--private")[0] == 0
    code, out, err = push("--space", "demo")
    assert (code, out) == (2, "")
    assert err.startswith("minigpt push: user/demo: exists and is public: ")
    assert set(demo(hub, "user/demo")) == set()


def test_model_and_space_are_added_to_a_collection_by_title_and_by_slug(push, hub):
    code, out, err = push("--space", "--collection", "My models")
    slug = HfApi().create_collection("My models", exists_ok=True).slug
    assert (code, err) == (0, "")
    assert out.endswith(f"{hub.endpoint}/collections/{slug}\n")
    expected = [("user/tiny", "model"), ("user/tiny", "space")]
    assert [(item["id"], item["type"]) for item in hub.collection(slug)["items"]] == expected
    assert push("--space", "--collection", slug)[0] == 0  # already in it
    assert [(item["id"], item["type"]) for item in hub.collection(slug)["items"]] == expected


def test_a_collection_that_is_created_for_a_private_model_is_private(push, hub):
    """Also if the repository existed and the flag is not repeated."""
    assert push("--private")[0] == push("--collection", "My models")[0] == 0
    assert hub.collection(HfApi().create_collection("My models", exists_ok=True).slug)["private"] is True


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


def test_the_metadata_is_yaml_that_quotes_the_version(push, hub, with_template):
    """Unquoted, a version such as 6.10 would be read as the number 6.1."""
    assert push("--space", folder=with_template)[0] == 0
    text = hub.files("user/tiny", repo_type="spaces")["README.md"].decode()
    assert isinstance(yaml.safe_load(text.split("---")[1])["sdk_version"], str)
