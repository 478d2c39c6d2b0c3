"""Uploading an adapter: what a hub holds afterwards, and one sentence for everything that can go wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.cli.hub_server import TOKEN, Hub, running_hub
from tests.tiny import tiny

from veneer import LoRA
from veneer.checkpoints import attach
from veneer.cli._hub import push_adapter
from veneer.cli.main import main
from veneer.errors import ConfigError, ExportError

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=")  # huggingface_hub's own upload of large files
FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    bank = attach(tiny("llama"))
    bank.add("sql", LoRA(r=2))
    for tensor in bank.parameters("sql"):
        tensor.data += 0.1
    path = tmp_path_factory.mktemp("runs") / "sql"
    bank.save("sql", path, base_name="org/base")
    return path


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with running_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        yield hub


def test_a_pushed_adapter_is_on_the_hub_byte_for_byte(hub: Hub, folder: Path) -> None:
    """The repository is created as asked, and holds the folder's files and the card."""
    pushed = push_adapter(folder, "me/sql", card="# sql\n", private=True)
    stored = hub.repositories["me/sql"]["main"]
    assert set(stored) == FILES
    assert stored["README.md"] == b"# sql\n"
    assert stored["adapter_model.safetensors"] == (folder / "adapter_model.safetensors").read_bytes()
    assert stored["adapter_config.json"] == (folder / "adapter_config.json").read_bytes()
    assert pushed.files == {name: len(stored[name]) for name in pushed.files}
    assert pushed.url == f"{hub.url}/me/sql"
    assert hub.visibility["me/sql"] == "private"
    assert hub.messages == ["Upload the adapter sql"]


def test_a_second_push_adds_a_commit_and_a_branch_or_pull_request_leaves_main_alone(hub: Hub, folder: Path) -> None:
    """The main branch changes only by a push to it."""
    push_adapter(folder, "me/sql", card="first")
    push_adapter(folder, "me/sql", card="second", message="Again")
    assert hub.repositories["me/sql"]["main"]["README.md"] == b"second"
    push_adapter(folder, "me/sql", card="third", revision="v3")
    request = push_adapter(folder, "me/sql", card="fourth", create_pr=True)
    assert hub.repositories["me/sql"]["main"]["README.md"] == b"second"
    assert hub.repositories["me/sql"]["v3"]["README.md"] == b"third"
    assert hub.repositories["me/sql"]["refs/pr/1"]["README.md"] == b"fourth"
    assert request.pull_request == hub.pull_requests[0]
    assert hub.messages[1] == "Again"


def test_other_files_of_the_folder_stay_here(hub: Hub, folder: Path, tmp_path: Path) -> None:
    """Only the files of an adapter are uploaded."""
    own = Path(shutil.copytree(folder, tmp_path / "own"))
    (own / "secret.txt").write_text("never")
    push_adapter(own, "sql", card="# sql")
    assert set(hub.repositories["me/sql"]["main"]) == FILES


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"refuse": 413}, "the hub answered 413"),
        ({"refuse": 403}, "does not accept this token for writing"),
        ({"corrupt": "adapter_model.safetensors"}, "the hub's adapter_model.safetensors differs"),
        ({"corrupt": "README.md"}, "the hub's README.md differs"),
    ],
)
def test_a_fault_of_the_hub_is_an_error(hub: Hub, folder: Path, fault: dict[str, Any], words: str) -> None:
    """A refused commit, and a file that is stored with another content, are reported."""
    for name, value in fault.items():
        setattr(hub, name, value)
    with pytest.raises(ExportError, match=words):
        push_adapter(folder, "me/sql", card="card")


def test_a_wrong_token_and_a_hub_that_is_not_there(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the remedy, or says that nothing answered."""
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ExportError, match=r"does not accept this token.*hf auth login"):
        push_adapter(folder, "me/sql", card="card")
    with pytest.raises(ExportError, match="could not be uploaded"):
        push_adapter(folder, "me/sql", card="card", endpoint="http://127.0.0.1:9")


@pytest.mark.parametrize("repo", ["", "a/b/c", "../x", "me/", "https://hub/me/sql", "me/a b", "me/a--b"])
def test_a_repository_of_another_form_is_refused(folder: Path, repo: str) -> None:
    """A name that is not a repository is refused before anything is sent."""
    with pytest.raises(ConfigError, match="expected NAME or OWNER/NAME"):
        push_adapter(folder, repo, card="card")


def test_the_command_pushes_a_run_with_a_card_and_a_dry_run_sends_nothing(
    hub: Hub, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run's adapter goes up with the generated card, or with the card that its folder has."""
    shutil.copytree(folder, tmp_path / "first" / "adapter")
    assert main(["push", str(tmp_path / "first"), "me/first", "--dry-run"]) == 0
    assert "me/first would hold:" in capsys.readouterr().out
    assert hub.repositories == {}
    assert main(["push", str(tmp_path / "first"), "me/first", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["files"]) == FILES
    card = hub.repositories["me/first"]["main"]["README.md"].decode()
    assert 'base_model: "org/base"' in card
    assert 'bank.load("me/first", ' in card
    (tmp_path / "first" / "adapter" / "README.md").write_text("mine")
    assert main(["push", str(tmp_path / "first"), "me/first"]) == 0
    assert hub.repositories["me/first"]["main"]["README.md"] == b"mine"
    assert main(["push", str(tmp_path / "nowhere"), "me/first"]) == 1
    assert "holds no adapter" in capsys.readouterr().err
