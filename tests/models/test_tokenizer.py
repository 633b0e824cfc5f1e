from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from cbpt_runtime.errors import CheckpointError, ClassListError
from cbpt_runtime.models.architecture import build_model
from cbpt_runtime.models.checkpoint import read_checkpoint
from cbpt_runtime.models.clip import DualEncoder, load_dual_encoder
from cbpt_runtime.models.config import check_model_config
from cbpt_runtime.models.data import ClassList
from cbpt_runtime.models.prompts import PromptEncoder
from cbpt_runtime.models.tokenizer import Tokenizer, prompt_notes
from cbpt_runtime.purification.vocabulary import build_vocabulary

pytestmark = pytest.mark.usefixtures("no_network")
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "photo", "of", "x", "cat", "dog", "red", "square")


@pytest.mark.parametrize("clean", [None, "lower", "canonicalize", "whitespace"])
def test_rows_are_those_of_open_clips_tokenizer(clean: str | None) -> None:
    options = {} if clean is None else {"clean": clean}
    tokenizer = Tokenizer({"context_length": 20, "tokenizer_kwargs": options})
    texts = ["A photo of a Dog!", "", "word " * 50, "naïve café 日本"]
    expected = open_clip.SimpleTokenizer(context_length=20, **options)(texts)
    assert torch.equal(tokenizer(texts), expected)
    assert (tokenizer.name, tokenizer.context_length, tokenizer.start) == ("open_clip BPE", 20, 1)


def test_the_context_length_is_77_unless_configured() -> None:
    assert Tokenizer({})(["a"]).shape == (1, 77)


def test_no_texts_give_no_rows() -> None:
    assert Tokenizer({})([]).shape == (0, 77)


def test_a_text_tower_with_too_few_tokens_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"got vocab_size 1000 and the token 49407"):
        Tokenizer({"vocab_size": 1000})(["a"])


def test_a_tokenizer_whose_files_are_not_here_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"the tokenizer someone/tokenizer beside the checkpoint .*got neither"
    ):
        Tokenizer({"hf_tokenizer_name": "someone/tokenizer"}, folder=tmp_path)


def test_a_local_tokenizer_without_transformers_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(CheckpointError, match="pip install transformers"):
        Tokenizer({"hf_tokenizer_name": "someone/tokenizer"}, folder=tmp_path)


# With transformers installed ------------------------------------------------------------------------


@pytest.fixture
def hub_folder(tmp_path: Path) -> Path:
    """A SigLIP-like model with a word-level Hugging Face tokenizer beside it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("transformers", reason="TRANSFORMERS NOT TESTED: the package is not installed")
        tokenizers: Any = pytest.importorskip("tokenizers")
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast.save(str(tmp_path / "tokenizer.json"))
    tokens = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **tokens}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


def written(folder: Path, vision: dict[str, Any], text_cfg: dict[str, Any]) -> DualEncoder:
    config = {"embed_dim": 16, "custom_text": True, "vision_cfg": vision, "text_cfg": text_cfg}
    state = build_model(check_model_config(config), folder=folder).state_dict()
    save_file({name: value.clone() for name, value in state.items()}, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    return load_dual_encoder(read_checkpoint(folder))


def test_a_local_hub_tokenizer_serves_texts_and_prompts(
    hub_folder: Path, tiny_configs: dict[str, Any]
) -> None:
    text_cfg = {
        **tiny_configs["siglip"]["text_cfg"],
        "vocab_size": 64,
        "hf_tokenizer_name": "someone/tokenizer",
    }
    encoder = written(hub_folder, tiny_configs["siglip"]["vision_cfg"], text_cfg)
    assert encoder.tokenizer(["a photo"])[0, :5].tolist() == [2, 4, 5, 3, 0]
    assert encoder.tokenizer.name == "someone/tokenizer"
    prompts = PromptEncoder(encoder, ["cat", "red square"])
    expected = encoder.encode_texts(["a photo of a cat", "a photo of a red square"])
    torch.testing.assert_close(prompts.encode(prompts.initial_contexts()), expected)


def test_a_transformers_text_tower_is_read_but_takes_no_contexts(
    hub_folder: Path, tiny_configs: dict[str, Any]
) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    tower = {
        "model_type": "roberta",
        "vocab_size": 64,
        "max_position_embeddings": 24,
        "pad_token_id": 0,
        **sizes,
    }
    (hub_folder / "config.json").write_text(json.dumps(tower))
    text_cfg = {"hf_model_name": "x/roberta", "hf_tokenizer_name": "x/roberta", "context_length": 8}
    encoder = written(hub_folder, tiny_configs["vit"]["vision_cfg"], text_cfg)
    assert encoder.encode_texts(["a cat", "a photo of a dog"]).shape == (2, 16)
    with pytest.raises(
        CheckpointError, match=r"got the text tower HFTextEncoder\. .*--parameterization embedding"
    ):
        PromptEncoder(encoder, ["cat", "dog"])


def test_code_beside_a_tokenizer_or_text_tower_does_not_run(
    hub_folder: Path, tmp_path: Path, tiny_configs: dict[str, Any]
) -> None:
    marker = tmp_path / "it-ran"
    (hub_folder / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()")
    (hub_folder / "config.json").write_text('{"model_type": "x", "auto_map": {"AutoModel": "evil.Model"}}')
    config = {**tiny_configs["custom-text"], "text_cfg": {"hf_model_name": "x/y"}}
    with pytest.raises(CheckpointError, match=r"its own code \(auto_map\)"):
        build_model(check_model_config(config), folder=hub_folder)
    (hub_folder / "config.json").unlink()
    settings = '{"auto_map": {"AutoTokenizer": ["evil.Tokenizer", null]}}'
    (hub_folder / "tokenizer_config.json").write_text(settings)
    with pytest.raises(CheckpointError, match="a tokenizer transformers can read"):
        Tokenizer({"hf_tokenizer_name": "x/y"}, folder=hub_folder)
    assert not marker.exists()


def test_a_text_tower_whose_files_are_not_here_is_refused(
    tmp_path: Path, tiny_configs: dict[str, Any]
) -> None:
    config = {**tiny_configs["custom-text"], "text_cfg": {"hf_model_name": "someone/bert"}}
    with pytest.raises(CheckpointError, match=r"the text tower someone/bert beside the checkpoint"):
        build_model(check_model_config(config), folder=tmp_path)


LONG = "word " * 140


def many(*names: str, template: str, folders: tuple[str, ...] = ()) -> ClassList:
    return ClassList(names=names, templates=((template,),) * len(names), folders=folders)


def test_prompts_that_fit_are_not_remarked_upon() -> None:
    tokenizer = Tokenizer({"context_length": 8})
    assert tokenizer.is_cut(["a b c d e f", "a b c d e f g", ""]) == [False, True, False]
    assert prompt_notes(many("cat", "dog", template="a b c d e {}"), tokenizer) == ()


def test_cut_prompts_are_counted() -> None:
    notes = prompt_notes(many("cat", "dog", template="{} " + LONG), Tokenizer({}))
    assert notes == (
        "2 of 2 prompts are longer than the 77 tokens of the text tower and were cut, first: "
        + ("cat " + LONG)[:80],
    )


def test_classes_that_are_equal_once_cut_are_refused() -> None:
    with pytest.raises(
        ClassListError, match=r"within 77 tokens; got the same for cat = dog \(2 of 2 prompts are longer"
    ):
        prompt_notes(many("cat", "dog", template=LONG + "{}"), Tokenizer({}))


def test_classes_with_the_same_sentence_are_refused() -> None:
    with pytest.raises(ClassListError, match=r"the same for cat = dog \(equal prompts\)"):
        prompt_notes(many("cat", "dog", template="a photo of an animal"), Tokenizer({}))


def test_two_classes_of_one_name_are_remarked_upon() -> None:
    classes = ClassList(
        names=("crane (a)", "crane (b)", "dog"),
        templates=(("a crane",), ("a crane",), ("a {}",)),
        folders=("a", "b", "c"),
    )
    assert prompt_notes(classes, Tokenizer({})) == (
        "classes of the same name have the same prompts, chance tells them apart: crane (a), crane (b)",
    )


def test_every_verb_refuses_prompts_that_are_equal(
    run: Callable,
    tiny_checkpoint_folder: Path,
    tiny_class_file: Path,
    tiny_image_folder: Path,
    tmp_path: Path,
) -> None:
    words = ("--classes", tiny_class_file, "--images", tiny_image_folder)
    output = tmp_path / "bundle"
    for verb in (
        ("purify", "--checkpoint", tiny_checkpoint_folder, "--template", LONG + "{}", "--output", output),
        ("evaluate", tiny_checkpoint_folder, "--template", LONG + "{}"),
    ):
        done = run(*verb, *words)
        assert done.code == 2
        assert "prompts that tell the classes apart within 16 tokens" in done.err
    sentences = tmp_path / "classes.json"
    sentences.write_text(json.dumps({name: [LONG + name] for name in ("cat", "dog")}))
    done = run("scan", tiny_checkpoint_folder, "--classes", sentences, "--images", tiny_image_folder)
    assert done.code == 2
    assert "the same for cat = dog" in done.err
    assert not output.exists()


def test_the_words_of_the_search_are_not_put_into_sentences_about_a_class(tiny_encoder: DualEncoder) -> None:
    classes = ClassList(
        names=("cat", "dog"), templates=(("A small animal that purrs.",), ("An animal that barks.",))
    )
    vocabulary = build_vocabulary(tiny_encoder, classes, tiny_encoder.class_embeddings(classes), 8)
    assert not (vocabulary.texts[2:] == vocabulary.texts[2]).all()
