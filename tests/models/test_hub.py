from __future__ import annotations

import shutil
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from email.message import Message
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
import pytest

from cbpt_runtime.errors import CheckpointError
from cbpt_runtime.models import hub
from cbpt_runtime.models.checkpoint import read_checkpoint
from cbpt_runtime.models.clip import load_dual_encoder

REVISION = "0" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache of the test's own."""
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    return folder


def put(cache: Path, repo: str, *files: Path) -> Path:
    """Lays files into the cache as the hub's client does."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / REVISION
    snapshot.mkdir(parents=True, exist_ok=True)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(REVISION)
    for file in files:
        shutil.copy(file, snapshot)
    return snapshot


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without network: no host name resolves."""

    def fail(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)


@pytest.fixture
def reachable(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A network that answers 404 to every request, and the addresses asked for."""
    asked: list[str] = []

    def answer(request: urllib.request.Request, timeout: float) -> None:
        assert 0 < timeout <= 10
        asked.append(request.full_url)
        raise urllib.error.HTTPError(request.full_url, 404, "Not Found", Message(), None)

    monkeypatch.setattr(urllib.request, "urlopen", answer)
    return asked


@pytest.mark.usefixtures("no_network")
def test_a_cached_hub_model_is_read_without_network(cache: Path, tiny_checkpoint_folder: Path) -> None:
    put(cache, "someone/model", *tiny_checkpoint_folder.iterdir())
    checkpoint = read_checkpoint("hf-hub:someone/model")
    assert (checkpoint.source, checkpoint.format) == ("hf-hub:someone/model", "pretrained")
    assert checkpoint.sha256 == read_checkpoint(tiny_checkpoint_folder).sha256
    assert load_dual_encoder(checkpoint).embed_dim == 16


@pytest.mark.usefixtures("cache", "unreachable")
@pytest.mark.parametrize(("source", "model"), [("hf-hub:someone/model", None), ("cc12m", "RN50")])
def test_without_network_the_error_is_quick_and_clear(source: str, model: str | None) -> None:
    start = time.monotonic()
    with pytest.raises(
        CheckpointError, match=r"in the local cache, or a network .*machine with network access"
    ):
        read_checkpoint(source, model=model)
    assert time.monotonic() - start < 5


def test_every_pretrained_tag_is_on_the_hub() -> None:
    assert all(open_clip.get_pretrained_cfg(*pair)["hf_hub"] for pair in open_clip.list_pretrained())


@pytest.mark.usefixtures("cache")
def test_a_repository_that_is_not_there_is_named(
    reachable: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(repo: str, filename: str, **_: Any) -> str:
        raise OSError(f"404 {repo} {filename}")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", absent)
    with pytest.raises(CheckpointError, match=r"at hf-hub:someone/model; got no such repository"):
        read_checkpoint("hf-hub:someone/model")
    assert len(reachable) == 1


@pytest.mark.usefixtures("cache", "no_network")
@pytest.mark.parametrize("repo", ["", "../../etc", "a/b/c", "with space/model"])
def test_ids_that_cannot_be_are_refused_without_network(repo: str) -> None:
    with pytest.raises(CheckpointError, match="got no such repository"):
        read_checkpoint(f"hf-hub:{repo}")


@pytest.mark.usefixtures("reachable")
def test_weights_are_taken_as_safetensors_where_there_are_any(
    cache: Path, tiny_checkpoint_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = put(cache, "someone/model", *tiny_checkpoint_folder.glob("*.json"))
    asked = []

    def download(repo: str, filename: str, **_: Any) -> str:
        asked.append(filename)
        if filename.endswith(".safetensors"):
            raise OSError("404")
        return str(snapshot / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    _, weights = hub.fetch_hub_model("someone/model")
    assert asked[0].endswith(".safetensors")
    assert asked[-1] == weights.name == "open_clip_pytorch_model.bin"


@pytest.mark.usefixtures("no_network")
def test_a_cached_tag_is_read_and_its_activation_is_the_one_it_was_trained_with(
    cache: Path, tiny_checkpoint_folder: Path
) -> None:
    repo = open_clip.get_pretrained_cfg("RN50", "openai")["hf_hub"].rstrip("/")
    put(cache, repo, *tiny_checkpoint_folder.iterdir())
    checkpoint = read_checkpoint("openai", model="RN50")
    assert checkpoint.format == "pretrained"
    assert checkpoint.model_config["quick_gelu"] is True
    assert checkpoint.notes == ("quick_gelu set to True, as openai was trained",)
    assert "weights mis-shaped" in " ".join(checkpoint.anomalies)  # the tiny weights are no RN50


@pytest.mark.usefixtures("reachable")
def test_only_built_in_configurations_choose_what_else_is_fetched(
    cache: Path, tiny_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[tuple[str, dict[str, Any]]] = []

    def download(repo: str, **options: Any) -> None:
        fetched.append((repo, options))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    hub.fetch_text_files({"hf_tokenizer_name": "someone/tokenizer"})
    hub.fetch_text_files({"hf_model_name": None})
    assert [repo for repo, _ in fetched] == ["someone/tokenizer"]
    assert not any(
        pattern.endswith((".py", ".bin")) or "*" in pattern for pattern in fetched[0][1]["allow_patterns"]
    )

    snapshot = put(cache, "someone/model", *tiny_folder("vit").iterdir())
    config = snapshot / "open_clip_config.json"
    config.write_text(config.read_text().replace('"heads"', '"hf_tokenizer_name": "elsewhere/x", "heads"'))
    checkpoint = read_checkpoint("hf-hub:someone/model")
    assert [repo for repo, _ in fetched] == ["someone/tokenizer", "someone/model"]
    with pytest.raises(CheckpointError, match="the tokenizer elsewhere/x beside the checkpoint"):
        load_dual_encoder(checkpoint)


@pytest.mark.usefixtures("no_network")
def test_local_files_are_the_checkpoints_own_before_the_caches(cache: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "tokenizer_config.json").write_text("{}")
    snapshot = put(cache, "someone/tokenizer", own / "tokenizer_config.json")
    assert hub.find_local_files("someone/tokenizer", "tokenizer_config.json", own) == own
    assert hub.find_local_files("someone/tokenizer", "tokenizer_config.json", tmp_path) == snapshot
    assert hub.find_local_files("someone/tokenizer", "config.json", None) is None
    assert hub.find_local_files("../../etc", "passwd", None) is None
