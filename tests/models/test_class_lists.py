from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest

from cbpt_runtime.errors import ClassListError
from cbpt_runtime.models.class_lists import read_class_list
from cbpt_runtime.models.data import ClassList, default_templates


def written(tmp_path: Path, content: Any, name: str = "classes.json") -> Path:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_text_files_hold_one_name_per_line(tmp_path: Path) -> None:
    content = "\ufefftench\r\n\r\n  goldfish, Carassius  \nC#\n[bracket]\nété\n"
    classes = read_class_list(written(tmp_path, content.encode(), "classes.txt"))
    assert classes.names == ("tench", "goldfish, Carassius", "C#", "[bracket]", "été")
    assert classes.templates == (default_templates(),) * 5


def test_the_default_templates_are_open_clips_eighty() -> None:
    templates = default_templates()
    assert len(templates) == 80
    rendered = [template("cat") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    assert [template.replace("{}", "cat") for template in templates] == rendered


@pytest.mark.parametrize(
    ("content", "templates"),
    [
        (["cat", "dog"], (("a {}",), ("a {}",))),
        ([{"name": "cat", "templates": ["my {}"]}, "dog"], (("my {}",), ("a {}",))),
        ([{"name": "cat"}, {"name": "dog", "templates": ["the {}", "a barking animal"]}],
         (("a {}",), ("the {}", "a barking animal"))),
        ({"cat": ["my {}"], "dog": ["a {}", "the {}"]}, (("my {}",), ("a {}", "the {}"))),
    ],
)  # fmt: skip
def test_json_may_give_each_class_its_templates(
    tmp_path: Path, content: Any, templates: tuple[tuple[str, ...], ...]
) -> None:
    classes = read_class_list(written(tmp_path, content), templates=["a {}"])
    assert classes.names == ("cat", "dog")
    assert classes.templates == templates


def test_texts_put_in_the_name_with_underscores_as_spaces() -> None:
    classes = ClassList(names=("red_square", "disc"), templates=(("a {}.", "the {} {}"), ("{}",)))
    assert classes.texts() == (("a red square.", "the red square red square"), ("disc",))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "two or more classes; got an empty list"),
        (["cat"], "two or more classes; got cat"),
        (["cat", "dog", "cat"], "every class name once .*got cat, cat"),
        (["Red_Square", "dog", "red square"], "every class name once .*got Red_Square, red square"),
        (["cat", " "], "got an empty name"),
        (["cat", 3], "expected names"),
        (["cat", ["dog"]], "expected names"),
        (["cat", {"name": "dog", "weight": 1}], "expected names"),
        (["cat", {"templates": ["a {}"]}], "expected names"),
        (["cat", {"name": "dog", "templates": "a {}"}], "a list of templates for dog"),
        (["cat", {"name": "dog", "templates": []}], "one or more non-empty templates .*none for dog"),
        (["cat", {"name": "dog", "templates": [" "]}], "one or more non-empty templates"),
        ({"cat": ["a {}"], "dog": 3}, "a list of templates for dog"),
        ("cat", "valid JSON"),
        ('"cat"', "a JSON list or object in .*; got str"),
        ('["cat", "dog"', "valid JSON"),
        ('{"cat": ["a {}"], "dog": ["a {}"], "cat": ["b {}"]}', "every class name once .*got cat, cat"),
        ("[" * 100_000, "valid JSON"),
        (b"\xff\xfe", "UTF-8 text"),
    ],
)
def test_bad_class_lists_are_refused(tmp_path: Path, names: Any, message: str) -> None:
    with pytest.raises(ClassListError, match=message):
        read_class_list(written(tmp_path, names))


def test_a_missing_class_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ClassListError, match=r"absent\.txt; got no such file"):
        read_class_list(tmp_path / "absent.txt")


def test_a_shared_template_without_the_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ClassListError, match=r"for the class name in every template; got a photo"):
        read_class_list(written(tmp_path, ["cat", "dog"]), templates=["a {}", "a photo"])


# Folders, columns and other people's lists -----------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("classes.tsv", "n02012849\tcrane\nn03126707\tcrane\nn01440764\ttench\n"),
        ("classes.txt", "folder\tname\nn02012849\tcrane\nn03126707\tcrane\nn01440764\ttench\n"),
        ("classes.csv", 'folder,name\nn02012849,"crane"\nn03126707,crane\nn01440764,tench\n'),
        ("synsets.txt", "n02012849 crane\nn03126707 crane\nn01440764 tench, Tinca tinca\n"),
        (
            "index.json",
            {"0": ["n02012849", "crane"], "1": ["n03126707", "crane"], "2": ["n01440764", "tench"]},
        ),
        ("names.json", {"n02012849": "crane", "n03126707": "crane", "n01440764": "tench"}),
        (
            "list.json",
            [
                {"folder": "n02012849", "name": "crane"},
                {"folder": "n03126707", "name": "crane"},
                {"folder": "n01440764", "name": "tench"},
            ],
        ),
    ],
)
def test_folders_and_names_may_differ_and_names_may_then_be_equal(
    tmp_path: Path, name: str, content: Any
) -> None:
    classes = read_class_list(written(tmp_path, content, name), templates=["a {}"])
    assert classes.folders == ("n02012849", "n03126707", "n01440764")
    assert classes.names == ("crane (n02012849)", "crane (n03126707)", "tench")
    assert classes.texts() == (("a crane",), ("a crane",), ("a tench",))


def test_columns_may_hold_templates(tmp_path: Path) -> None:
    content = "a\tcat\tmy {}\tthe {}\nb\tdog\t\n"
    classes = read_class_list(written(tmp_path, content, "c.tsv"), templates=["a {}"])
    assert classes.templates == (("my {}", "the {}"), ("a {}",))


def test_an_index_is_read_in_the_order_of_its_numbers(tmp_path: Path) -> None:
    index = {str(number): [f"n{number:08}", f"thing {number}"] for number in (10, 9, 2)}
    assert read_class_list(written(tmp_path, index)).names == ("thing 2", "thing 9", "thing 10")
    numbers = {"dog": 1, "cat": 0}
    assert read_class_list(written(tmp_path, numbers)).names == ("cat", "dog")


def test_open_clips_own_thousand_names_work_with_their_folders(tmp_path: Path) -> None:
    rows = [f"n{number:08}\t{name}" for number, name in enumerate(open_clip.IMAGENET_CLASSNAMES)]
    classes = read_class_list(written(tmp_path, "\n".join(rows), "imagenet.tsv"))
    assert len(classes.names) == 1000
    assert [name for name in classes.names if name.startswith(("missile", "sunglasses"))] == [
        "missile (n00000657)",
        "missile (n00000744)",
        "sunglasses (n00000836)",
        "sunglasses (n00000837)",
    ]
    plain = written(tmp_path, "\n".join(open_clip.IMAGENET_CLASSNAMES), "imagenet.txt")
    with pytest.raises(ClassListError, match=r"missile, missile, sunglasses.*columns folder and name"):
        read_class_list(plain)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.json", {"n01440764": ["tench"], "n01443537": ["goldfish"]}, "bare words: tench"),
        ("c.json", {"n01440764": ["tench", "Tinca tinca"], "b": ["a {}"]}, "bare words: tench, Tinca tinca"),
        ("c.json", {"a": ["great white shark"], "b": ["a {}"]}, "for a, with '{}' for the name or whole"),
        ("c.json", [{"name": "cat", "folder": 3}, "dog"], "expected names or"),
        (
            "c.json",
            [{"name": "cat", "folder": "x"}, {"name": "dog", "folder": "X"}],
            "folder of its own; got x, X",
        ),
        ("c.json", r'["cat\ud800", "dog"]', "got half of a surrogate pair"),
        ("c.tsv", "a\tcat\nb\n", "folder and name in every line of .*line 2: b"),
        ("c.tsv", "a\tcat\n\tdog\n", "folder and name in every line of .*line 2"),
        ("c.tsv", "a\tcat\tcat\nb\tdog\n", "bare words: cat"),
    ],
)
def test_lists_that_would_make_wrong_prompts_are_refused(
    tmp_path: Path, name: str, content: Any, message: str
) -> None:
    with pytest.raises(ClassListError, match=message):
        read_class_list(written(tmp_path, content, name))


def test_whole_sentences_need_no_place_for_the_name(tmp_path: Path) -> None:
    content = {"tench": ["A freshwater fish with red eyes."], "cat": ["A small animal that purrs."]}
    assert read_class_list(written(tmp_path, content)).texts()[0] == ("A freshwater fish with red eyes.",)
