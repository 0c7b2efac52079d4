"""The local Hub server serves unmodified clients as the Hub does."""

from pathlib import Path

import datasets
import pytest
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from tests.hub_server import TOKEN


def test_load_dataset_reads_a_dataset_repository(hub):
    hub.put("user/plays", {"train.txt": b"To be, or\nnot to be\n", "test.txt": b"That is\n"}, repo_type="datasets")
    rows = datasets.load_dataset("user/plays")
    assert rows["train"]["text"] == ["To be, or", "not to be"]
    assert rows["test"]["text"] == ["That is"]


def test_load_dataset_streams_an_uploaded_file(hub, tmp_path):
    datasets.Dataset.from_dict({"text": ["one", "two", "three"]}).to_parquet(tmp_path / "rows.parquet")
    HfApi().create_repo("user/rows", repo_type="dataset")
    HfApi().upload_file(
        path_or_fileobj=tmp_path / "rows.parquet",
        path_in_repo="data/train.parquet",
        repo_id="user/rows",
        repo_type="dataset",
    )
    rows = datasets.load_dataset("user/rows", split="train", streaming=True)
    assert [row["text"] for row in rows] == ["one", "two", "three"]
    assert any(request.path.startswith("/lfs/") for request in hub.requests)
    assert not any(TOKEN in str(request.headers) for request in hub.requests if request.path.startswith("/lfs/"))


def test_an_uploaded_folder_is_downloaded_by_branch_and_by_commit(hub, tmp_path):
    api = HfApi()
    api.create_repo("user/model")
    (tmp_path / "folder" / "nested").mkdir(parents=True)
    (tmp_path / "folder" / "nested" / "note.txt").write_text("first")
    (tmp_path / "folder" / "weights.bin").write_bytes(bytes(1000))
    first = api.upload_folder(repo_id="user/model", folder_path=tmp_path / "folder").oid
    (tmp_path / "folder" / "nested" / "note.txt").write_text("second")
    api.create_branch("user/model", branch="a/b")
    api.upload_folder(repo_id="user/model", folder_path=tmp_path / "folder", revision="a/b", commit_message="two")
    for revision, text in ((first, "first"), ("main", "first"), ("a/b", "second")):
        folder = snapshot_download("user/model", revision=revision)
        assert Path(folder, "nested", "note.txt").read_text() == text
    titles = [commit.title for commit in api.list_repo_commits("user/model", revision="a/b")]
    assert titles == ["two", "Upload folder using huggingface_hub", "initial commit"]
    assert {ref.name for ref in api.list_repo_refs("user/model").branches} == {"main", "a/b"}
    assert [file.path for file in api.list_repo_tree("user/model")] == [".gitattributes", "nested", "weights.bin"]
    api.delete_folder("nested", "user/model")
    assert api.list_repo_files("user/model") == [".gitattributes", "weights.bin"]


def test_without_a_token_public_repositories_are_readable_and_nothing_is_writable(hub, monkeypatch):
    HfApi().create_repo("user/private", private=True)
    hub.put("user/open", {"a.txt": b"a"})
    hub.put("other/open", {"a.txt": b"a"})
    with pytest.raises(HfHubHTTPError, match="403"):
        HfApi().upload_file(path_or_fileobj=b"b", path_in_repo="b", repo_id="other/open")
    monkeypatch.delenv("HF_TOKEN")
    assert hf_hub_download("user/open", "a.txt")
    with pytest.raises(RepositoryNotFoundError):
        HfApi().model_info("user/private")
    with pytest.raises(HfHubHTTPError, match="401"):
        HfApi().upload_file(path_or_fileobj=b"b", path_in_repo="b", repo_id="user/open")
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        HfApi().whoami()


def test_a_commit_with_an_outdated_parent_or_unknown_branch_is_rejected(hub):
    first = hub.put("user/model", {"a.txt": b"a"})
    hub.put("user/model", {"a.txt": b"b"})
    with pytest.raises(HfHubHTTPError, match="412"):
        HfApi().upload_file(path_or_fileobj=b"c", path_in_repo="a.txt", repo_id="user/model", parent_commit=first)
    with pytest.raises(RevisionNotFoundError):
        HfApi().upload_file(path_or_fileobj=b"c", path_in_repo="a.txt", repo_id="user/model", revision="absent")
    assert hub.files("user/model")["a.txt"] == b"b"
