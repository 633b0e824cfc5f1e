from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cbpt_runtime.bundle import Bundle
from cbpt_runtime.cli.output import plain_progress, printable

VERBS = ("purify", "inspect", "classify", "evaluate", "demo")


def fresh(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | environment,
        check=False,
    )


def test_help_answers_quickly_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from cbpt_runtime.__main__ import main\n"
        "try: main(['--help'])\n"
        "finally: print(sorted({'torch','open_clip','matplotlib','onnxruntime','numpy'} & set(sys.modules)))"
    )
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = fresh("-c", code)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.stdout.strip().endswith("[]")
    assert min(seconds) < 0.5  # processor time: other work on the machine does not count


def test_importing_the_package_imports_nothing_heavy() -> None:
    done = fresh("-c", "import sys, cbpt_runtime; print(cbpt_runtime.__version__, 'numpy' in sys.modules)")
    assert re.fullmatch(r"\d+\.\d+\.\d+ False\n", done.stdout)


def test_every_public_name_can_be_imported() -> None:
    import cbpt_runtime

    assert set(dir(cbpt_runtime)) >= set(cbpt_runtime.__all__)
    for name in cbpt_runtime.__all__:
        assert getattr(cbpt_runtime, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        _ = cbpt_runtime.nothing


def test_help_lists_the_verbs_and_the_exit_codes(run: Callable) -> None:
    done = run("--help")
    assert done.code == 0
    assert all(verb in done.out for verb in VERBS)
    assert "wrong usage" in done.out


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(run: Callable, verb: str) -> None:
    assert run(verb, "--help").code == 0


def test_the_version_is_printed(run: Callable) -> None:
    assert re.fullmatch(r"cbpt-runtime \d+\.\d+\.\d+\n", run("--version").out)


@pytest.mark.parametrize(
    "arguments",
    [
        ("purify",),
        ("nonsense",),
        ("classify", "b"),
        ("inspect", "--nonsense"),
        ("demo", "--seed", "-1"),
        ("purify", "--checkpoint", "x", "--classes", "x", "--images", "x", "--output", "x", "--shots", "0"),
        (
            "purify",
            "--checkpoint",
            "x",
            "--classes",
            "x",
            "--images",
            "x",
            "--output",
            "x",
            "--device",
            "tpu",
        ),
    ],
)
def test_wrong_usage_exits_2_and_leaves_stdout_empty(run: Callable, arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert (done.code, done.out) == (2, "")
    assert done.err


def test_an_input_error_exits_2_and_says_what_to_do(run: Callable, tmp_path: Path) -> None:
    done = run("evaluate", tmp_path / "missing", "--images", tmp_path)
    assert (done.code, done.out) == (2, "")
    assert re.search(r"error: expected a bundle folder.*\n +got .*missing.*\n +Give the folder", done.err)


def test_inspect_prints_a_bundle_for_people_and_machines(run: Callable, tiny_bundle: Bundle) -> None:
    text = run("inspect", tiny_bundle.path)
    assert "Blue Stripes" in text.out
    parsed = json.loads(run("inspect", tiny_bundle.path, "--json").out)
    assert parsed["digest"] == tiny_bundle.digest


def test_inspect_prints_a_checkpoint(run: Callable, tiny_checkpoint_folder: Path) -> None:
    assert json.loads(run("inspect", tiny_checkpoint_folder, "--json").out)["image_size"] == [32, 32]
    assert "32" in run("inspect", tiny_checkpoint_folder).out


def test_classify_prints_labels_and_the_alarm(
    run: Callable, tiny_bundle: Bundle, tiny_image_folder: Path
) -> None:
    images = sorted(tiny_image_folder.rglob("*.png"))[:2]
    parsed = json.loads(run("classify", tiny_bundle.path, *images, "--top", 2, "--json").out)
    assert [image["image"] for image in parsed["images"]] == [str(image) for image in images]
    assert all(len(image["labels"]) == 2 and 0 <= image["alarm"] <= 1 for image in parsed["images"])
    text = run("classify", tiny_bundle.path, images[0])
    assert text.code == 0
    assert re.search(r"alarm", text.out)


def test_classify_reads_an_image_from_stdin(
    run: Callable,
    tiny_bundle: Bundle,
    tiny_image_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    image = min(tiny_image_folder.rglob("*.png"))
    with image.open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        parsed = json.loads(run("classify", tiny_bundle.path, "-", image, "--json").out)
    one, two = parsed["images"]
    assert (one["image"], one["labels"]) == ("-", two["labels"])


def test_classify_takes_whatever_classifies(
    run: Callable,
    tiny_served: Path,
    tiny_graph: Path,
    tiny_checkpoint_folder: Path,
    tiny_class_file: Path,
    tiny_image_folder: Path,
) -> None:
    photo = min(tiny_image_folder.rglob("*.png"))
    for kind, source in (("onnx", tiny_graph), ("repository", tiny_served)):
        parsed = json.loads(run("classify", source, photo, "--json").out)
        assert (set(parsed), parsed[kind]) == ({kind, "digest", "images"}, str(source))
        assert 0 <= parsed["images"][0]["alarm"] <= 1
    classes = ("--classes", tiny_class_file, "--template", "a {}")
    parsed = json.loads(run("classify", tiny_checkpoint_folder, photo, *classes, "--json").out)
    assert parsed["images"][0]["alarm"] is None
    assert "–" in run("classify", tiny_checkpoint_folder, photo, *classes).out
    refused = run("classify", tiny_checkpoint_folder, photo)
    assert (refused.code, "--classes" in refused.err) == (2, True)


def test_classify_shows_how_far_it_is_with_many_images(
    run: Callable, tiny_graph: Path, tiny_image_folder: Path
) -> None:
    done = run("classify", tiny_graph, *[tiny_image_folder] * 3, "--json")
    assert "classify 108/108" in done.err
    assert len(json.loads(done.out)["images"]) == 108


def test_classify_names_a_broken_image(run: Callable, tiny_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n")
    done = run("classify", tiny_bundle.path, tmp_path / "broken.png")
    assert (done.code, done.out) == (2, "")
    assert "broken.png" in done.err


def test_evaluate_prints_before_and_after(
    run: Callable, tiny_bundle: Bundle, tiny_image_folder: Path
) -> None:
    arguments = ("evaluate", tiny_bundle.path, "--images", tiny_image_folder)
    attack = ("--triggered", tiny_image_folder, "--target", "blue_stripes")
    parsed = json.loads(run(*arguments, *attack, "--json").out)
    assert parsed["before"]["attack_success_rate"]["total"] == 24
    assert set(parsed["after"]["clean_accuracy"]) == {"rate", "count", "total", "low", "high"}
    text = run(*arguments, *attack)
    assert all(word in text.out for word in ("ASR", "floor", "PA", "before", "after", "AUROC"))
    assert "clean images 36/36" in text.err
    assert "ASR" not in run(*arguments).out


def test_evaluate_puts_an_attack_on_the_images_and_compares_in_one_table(
    run: Callable, tiny_bundle: Bundle, tiny_checkpoint_folder: Path, tiny_image_folder: Path
) -> None:
    arguments = ("evaluate", tiny_bundle.path, tiny_checkpoint_folder, "--images", tiny_image_folder)
    attack = ("--attack", "badnet", "--set", "size=8", "--target", "blue_stripes")
    text = run(*arguments, *attack)
    assert (text.code, "zero-shot" in text.out, "ASR" in text.out) == (0, True, True)
    found = json.loads(run(*arguments, *attack, "--json").out)["evaluations"]
    assert [one["kind"] for one in found] == ["bundle", "checkpoint"]
    assert found[0]["attack"]["kind"] == "BadNet"
    assert run(*arguments, *attack, "--format", "markdown").out.startswith("| model | head | CA | ASR |")
    rows = run(*arguments, *attack, "--format", "csv").out.splitlines()
    assert (len(rows), rows[0][:10]) == (4, "model,kind")


def test_evaluate_writes_a_report_once(
    run: Callable, tiny_bundle: Bundle, tiny_image_folder: Path, tmp_path: Path
) -> None:
    page = tmp_path / "out" / "report.html"
    arguments = ("evaluate", tiny_bundle.path, "--images", tiny_image_folder, "--report", page)
    assert str(page) in run(*arguments).err
    assert page.read_text().startswith("<!doctype html>")
    again = run(*arguments)
    assert (again.code, "--force" in again.err) == (2, True)
    assert run(*arguments, "--force").code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--attack", "bagnet", "--target", "red_square"), "badnet, badnet-random"),
        (("--attack", "badclip", "--target", "red_square"), "trigger.safetensors"),
        (("--attack", "badnet", "--target", "lion"), "red_square, green disc, Blue Stripes"),
        (("--attack", "badnet", "--set", "size=40", "--target", "red_square"), "at least 40x40 pixels"),
        (("--attack", "badnet", "--set", "sice=4", "--target", "red_square"), "size, location, pattern"),
        (("--attack", "badnet"), "--target"),
        (("--set", "size=4"), "Name the attack"),
    ],
)
def test_evaluate_says_what_is_valid_and_exits_with_two(
    run: Callable, tiny_bundle: Bundle, tiny_image_folder: Path, options: tuple[str, ...], message: str
) -> None:
    done = run("evaluate", tiny_bundle.path, "--images", tiny_image_folder, *options)
    assert (done.code, done.out) == (2, "")
    assert message in " ".join(done.err.split())


def test_evaluate_refuses_an_empty_folder(run: Callable, tiny_bundle: Bundle, tmp_path: Path) -> None:
    done = run("evaluate", tiny_bundle.path, "--images", tmp_path)
    assert (done.code, done.out) == (2, "")
    assert "missing: red_square" in done.err


def test_pipes_get_no_control_codes(run: Callable, tiny_bundle: Bundle) -> None:
    assert "\x1b" not in run("inspect", tiny_bundle.path).out


def test_control_characters_of_a_file_never_reach_the_terminal() -> None:
    assert printable("\x1b]0;owned\x07 кот\n") == "?]0;owned? кот?"


def test_plain_progress_says_first_last_and_little_between(capsys: pytest.CaptureFixture[str]) -> None:
    report = plain_progress(interval_s=3600)
    for step in range(1, 101):
        report("tuning", step, 100, {"loss": 1 / step})
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("tuning 1/100  loss 1")
    assert lines[1].startswith("tuning 100/100  loss 0.01")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_program_with_the_shells_exit_code(number: signal.Signals, code: int) -> None:
    program = (
        "import signal, cbpt_runtime.loading as i; from cbpt_runtime.__main__ import main\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored in jobs of the background
        f"i.inspect_path = lambda *a, **k: signal.raise_signal({int(number)})\n"
        "main(['inspect', 'x'])"
    )
    done = fresh("-c", program)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
