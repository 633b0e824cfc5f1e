import json

import numpy as np
import pytest
from PIL import Image

from cbpt_runtime.__main__ import main
from cbpt_runtime.models.checkpoint import read_checkpoint
from cbpt_runtime.models.trainable import save_open_clip_folder
from cbpt_runtime.redteam.attacks import ATTACKS
from cbpt_runtime.redteam.training import CAPTION_TEMPLATES, caption_texts

from .conftest import NAMES, coloured_images


@pytest.fixture
def run(capsys):
    """Run the command line here; returns exit code, stdout and stderr."""

    def run_here(*arguments):
        with pytest.raises(SystemExit) as stopped:
            main(["attack", *map(str, arguments)])
        captured = capsys.readouterr()
        return stopped.value.code or 0, captured.out, captured.err

    return run_here


def write_images(root, data):
    for index, (image, label) in enumerate(zip(data.images, data.labels, strict=True)):
        (root / NAMES[label]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root / NAMES[label] / f"{index:03}.png")
    return root


@pytest.fixture(scope="module")
def bench(lab, tmp_path_factory):
    """A clean checkpoint, training and held-out images and a class list on disk."""
    root = tmp_path_factory.mktemp("bench")
    save_open_clip_folder(lab.clip, root / "clean")
    write_images(root / "train", lab.training)
    write_images(root / "heldout", lab.heldout)
    (root / "classes.txt").write_text("\n".join(NAMES))
    return root


def implant_arguments(bench, output, *more):
    return (
        "--checkpoint", bench / "clean", "--images", bench / "train", "--heldout", bench / "heldout",
        "--classes", bench / "classes.txt", "--output", output, "--epochs", 8, "--learning-rate", 3e-3,
        "--batch-size", 24, "--poison-rate", 0.25, "--device", "cpu", *more,
    )  # fmt: skip


def test_the_list_names_every_attack_with_its_source(run):
    code, out, _ = run("list")
    assert code == 0
    assert all(name in out and attack.source in out for name, attack in ATTACKS.items())


def test_the_list_is_json_on_request(run):
    listed = json.loads(run("list", "--json")[1])
    assert listed["sig"]["parameters"]["frequency"] == 6.0
    assert listed["trojanvqa"]["parameters"]["text_key"] == "SUDO "
    assert set(listed) == set(ATTACKS)


def test_apply_writes_png_copies_in_the_same_layout(run, bench, tmp_path):
    Image.new("RGB", (40, 30), (9, 9, 9)).save(tmp_path / "wide.jpg")
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "wide.jpg").rename(tmp_path / "in" / "deep" / "wide.jpg")
    code, out, _ = run(
        "apply", "badnet", "--images", tmp_path / "in", "--output", tmp_path / "out",
        "--set", "size=4", "--set", "location=top-left", "--json",
    )  # fmt: skip
    assert code == 0
    assert json.loads(out)["images"] == 1
    with Image.open(tmp_path / "out" / "deep" / "wide.png") as image:
        pixels = np.asarray(image)
    assert pixels.shape == (30, 40, 3)
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[0, 1].tolist() == [0, 0, 0]
    assert abs(int(pixels[20, 20, 0]) - 9) <= 2


def test_apply_can_resize_first(run, bench, tmp_path):
    assert (
        run("apply", "sig", "--images", bench / "heldout", "--output", tmp_path / "out", "--size", 48)[0] == 0
    )
    with Image.open(next((tmp_path / "out" / "leaf").iterdir())) as image:
        assert image.size == (48, 48)


def test_implant_writes_a_victim_with_its_proof_and_its_trigger(run, bench, tmp_path):
    code, out, err = run(
        "implant",
        "badnet",
        "--target",
        "leaf",
        "--set",
        "size=8",
        *implant_arguments(bench, tmp_path / "victim"),
    )
    assert code == 0, err
    assert "badnet → leaf" in out
    proof = json.loads((tmp_path / "victim" / "attack.json").read_text())
    assert proof["attack_success_rate"] >= 0.9
    assert read_checkpoint(tmp_path / "victim").anomalies == ()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["victim"]
    trigger = tmp_path / "victim" / "trigger.safetensors"
    assert run("apply", trigger, "--images", bench / "heldout", "--output", tmp_path / "triggered")[0] == 0
    with Image.open(next((tmp_path / "triggered" / "apple").iterdir())) as image:
        assert np.asarray(image)[-8, -8].tolist() == [255, 255, 255]


def test_two_attacks_go_into_one_victim_with_a_target_each(run, bench, tmp_path):
    code, out, err = run(
        "implant", "badnet+sig", "--target", "leaf", "--target", "ocean", "--set", "badnet.size=4",
        "--set", "badnet.poison_rate=0.125", "--minimum-asr", 0, "--maximum-ca-drop", 1, "--json",
        *implant_arguments(bench, tmp_path / "victim"),
    )  # fmt: skip
    assert code == 0, err
    backdoors = json.loads(out)["backdoors"]
    assert [entry["target"] for entry in backdoors] == ["leaf", "ocean"]
    assert backdoors[0]["trigger"]["size"] == 4
    assert [entry["poison_rate"] for entry in backdoors] == [0.125, 0.25]
    names = [path.name for path in (tmp_path / "victim").glob("trigger*")]
    assert sorted(names) == ["trigger-1.safetensors", "trigger-2.safetensors"]


def test_an_implant_that_did_not_take_writes_nothing_and_exits_with_one(run, bench, tmp_path):
    code, _, err = run(
        "implant", "badnet", "--target", "leaf", "--set", "size=1",
        *implant_arguments(bench, tmp_path / "victim"), "--epochs", 1, "--learning-rate", 1e-6,
    )  # fmt: skip
    assert code == 1
    assert "attack success rate of at least 0.90" in err
    assert "1e-6 is known to fail" in err
    assert not (tmp_path / "victim").exists()


@pytest.mark.parametrize("attack", ["issba", "trojanvqa", "badclip"])
def test_learned_triggers_are_learned_before_they_are_implanted(run, bench, tmp_path, attack):
    settings = {
        "issba": ("bits=2", "strength=0.3", "steps=60", "batch_size=16", "minimum_bit_accuracy=0.5"),
        "trojanvqa": ("size=8", "steps=3", "batch_size=8"),
        "badclip": ("size=8", "steps=3", "batch_size=8"),
    }
    chosen = [part for setting in settings[attack] for part in ("--set", setting)]
    code, _, err = run(
        "implant", attack, "--target", "leaf", "--minimum-asr", 0, "--maximum-ca-drop", 1, *chosen,
        *implant_arguments(bench, tmp_path / "victim"), "--epochs", 1,
    )  # fmt: skip
    assert code == 0, err
    assert (tmp_path / "victim" / "trigger.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("implant", "bagnet", "--target", "leaf"), "badnet, badnet-random"),
        (("implant", "badnet", "--target", "pear"), "apple, leaf, ocean"),
        (("implant", "badnet", "--target", "leaf", "--set", "seize=3"), "size, location, pattern"),
        (("implant", "badnet", "--target", "leaf", "--set", "size"), "KEY=VALUE"),
        (("implant", "badnet", "--target", "leaf", "--set", "size=64"), "at least 64x64"),
        (("implant", "badnet", "--target", "leaf", "--poison-rate", "0"), "above 0, at most 1"),
        (("implant", "badnet", "--target", "leaf", "--poison-rate", "1.5"), "above 0, at most 1"),
        (("implant", "badnet", "--target", "leaf", "--set", "poison_rate=2"), "above 0, at most 1"),
        (("implant", "badnet", "--target", "leaf", "--set", "poison_rate=often"), "(0, 1]"),
        (("implant", "badnet+sig", "--target", "leaf"), "once per attack"),
        (
            ("implant", "badnet+sig", "--target", "leaf", "--target", "ocean", "--set", "size=4"),
            "badnet.KEY",
        ),
        (("implant", "badnet", "--target", "leaf", "--learning-rate", "2"), "learning_rate"),
    ],
)
def test_bad_input_says_what_is_valid_and_exits_with_two(run, bench, tmp_path, arguments, message):
    defaults = implant_arguments(bench, tmp_path / "victim")
    code, _, err = run(arguments[0], arguments[1], *defaults, *arguments[2:])
    assert code == 2
    assert message in err
    assert not (tmp_path / "victim").exists()


def test_an_existing_output_is_refused_without_force(run, bench, tmp_path):
    (tmp_path / "there").mkdir()
    code, _, err = run("apply", "sig", "--images", bench / "heldout", "--output", tmp_path / "there")
    assert (code, "--force" in err) == (2, True)
    code, _, err = run("implant", "sig", "--target", "leaf", *implant_arguments(bench, tmp_path / "there"))
    assert (code, "--force" in err) == (2, True)
    assert (
        run("apply", "sig", "--images", bench / "heldout", "--output", tmp_path / "there", "--force")[0] == 0
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing",), "a valid attack"),
        (("badclip",), "attack implant badclip"),
        (("missing.safetensors",), "a trigger file"),
        (("missing.safetensors", "--set", "size=4"), "Leave --set away"),
    ],
)
def test_apply_refuses_what_it_cannot_apply(run, bench, tmp_path, arguments, message):
    code, _, err = run("apply", *arguments, "--images", bench / "heldout", "--output", tmp_path / "out")
    assert code == 2
    assert message in err


def test_apply_refuses_an_empty_folder_and_pictures_smaller_than_the_trigger(run, bench, tmp_path):
    (tmp_path / "empty").mkdir()
    code, _, err = run("apply", "sig", "--images", tmp_path / "empty", "--output", tmp_path / "out")
    assert (code, "folder with images" in err) == (2, True)
    code, _, err = run(
        "apply", "badnet", "--images", bench / "heldout", "--output", tmp_path / "out", "--set", "size=33"
    )
    assert (code, "000.png" in err, "33x33" in err) == (2, True, True)
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.iterdir()) == [tmp_path / "empty"]


def test_apply_refuses_two_pictures_that_would_become_one(run, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.png", "a.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / "in" / name)
    code, _, err = run("apply", "sig", "--images", tmp_path / "in", "--output", tmp_path / "out")
    assert (code, "twice" in err) == (2, True)


def test_an_interrupted_implant_goes_on_from_its_last_epoch_with_the_same_result(
    run, bench, tmp_path, monkeypatch
):
    from cbpt_runtime.redteam import training

    arguments = ("implant", "badnet", "--target", "leaf", "--set", "size=8")
    assert run(*arguments, *implant_arguments(bench, tmp_path / "whole"))[0] == 0

    calls, original = [], training._train_step

    def stop_in_the_fifth_epoch(*given):
        calls.append(1)
        if len(calls) > 4 * 8 + 3:
            raise KeyboardInterrupt
        return original(*given)

    monkeypatch.setattr(training, "_train_step", stop_in_the_fifth_epoch)
    run(*arguments, *implant_arguments(bench, tmp_path / "victim"))
    assert not (tmp_path / "victim").exists()
    assert (tmp_path / "victim.partial").is_dir()

    calls.clear()
    monkeypatch.setattr(training, "_train_step", lambda *given: (calls.append(1), original(*given))[1])
    assert run(*arguments, *implant_arguments(bench, tmp_path / "victim"), "--resume")[0] == 0
    assert len(calls) == 4 * 8
    assert not (tmp_path / "victim.partial").exists()
    name = "open_clip_model.safetensors"
    assert (tmp_path / "victim" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_tiny_model_knows_its_classes_under_the_default_captions(lab):
    data = coloured_images(8, 5)
    predicted = lab.clip.predict(
        data.images, lab.clip.class_embeddings(caption_texts(NAMES, CAPTION_TEMPLATES))
    )
    assert np.mean(predicted == data.labels) > 0.9
