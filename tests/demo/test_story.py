import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from cbpt_runtime.demo import story, suspect
from cbpt_runtime.demo.story import check_purification, run_demo
from cbpt_runtime.demo.suspect import MODEL_CONFIG, TARGET, DemoScale, draw_pictures
from cbpt_runtime.errors import ImplantError, OutputError, PurificationError
from cbpt_runtime.evaluation import Evaluation, HeadRates, metrics
from cbpt_runtime.models.trainable import new_trainable
from cbpt_runtime.redteam.implant import BackdoorMeasure, Implant
from cbpt_runtime.redteam.training import TrainConfig

SMALL = DemoScale(names=("owl", "teapot"), train_per_class=4, test_per_class=2, epochs=1, batch_size=4)


def rates(clean: int, attack: int) -> HeadRates:
    return HeadRates(
        clean_accuracy=metrics.wilson(clean, 100), attack_success_rate=metrics.wilson(attack, 100)
    )


def evaluation(*, clean: int = 95, attack: int = 2, suspects: tuple[str, ...] = (TARGET,)) -> Evaluation:
    return Evaluation(
        source="bundle",
        kind="bundle",
        digest="0" * 64,
        class_names=("owl", TARGET),
        verdict="backdoored",
        suspects=suspects,
        target=TARGET,
        attack={"folder": "triggered"},
        clean_images=100,
        triggered_images=100,
        before=rates(96, 99),
        after=rates(clean, attack),
        alarm=None,
    )


@pytest.fixture
def quick(monkeypatch):
    """The demo without its two expensive steps: no training, and a purification that only answers."""
    measure = BackdoorMeasure(
        attack="badnet",
        target=TARGET,
        attack_success_rate=0.99,
        poisoned_accuracy=0.0,
        floor=0.0,
        target_recall=1.0,
        attack_success_rate_without_key=0.99,
    )
    implanted = Implant(
        clip=new_trainable(MODEL_CONFIG, seed=0),
        clean_accuracy_before=0.1,
        clean_accuracy=0.95,
        measures=(measure,),
        backdoors=(suspect.backdoor(),),
        config=TrainConfig(),
        final_loss=1.0,
    )

    class Bundle:
        path = None

    def purified(output, seed, device, progress):
        bundle = Bundle()
        bundle.path = output / "bundle"
        return bundle

    monkeypatch.setattr(story, "train_suspect", lambda *args, **kwargs: (implanted, implanted))
    monkeypatch.setattr(story, "purify_suspect", purified)
    monkeypatch.setattr("cbpt_runtime.evaluation.evaluate", lambda *args, **kwargs: evaluation())


def test_the_demo_leaves_the_folders_it_promises(quick, tmp_path):
    result = run_demo(tmp_path / "demo", scale=SMALL)
    assert sorted(path.name for path in (tmp_path / "demo").iterdir()) == [
        ".cbpt-runtime.json",
        "classes.txt",
        "images",
        "pictures.png",
        "reference-checkpoint",
        "suspect-checkpoint",
        "triggered",
    ]
    assert result.classes_file.read_text() == "owl\nteapot\n"
    assert len(list((result.train_images / "teapot").iterdir())) == 4
    assert len(list((result.triggered_images / "owl").iterdir())) == 2
    assert result.report == tmp_path / "demo" / "bundle" / "report.html"
    proof = json.loads((result.checkpoint / "attack.json").read_text())
    assert proof["target"] == TARGET


def test_the_result_is_json(quick, tmp_path):
    result = json.loads(json.dumps(run_demo(tmp_path / "demo", scale=SMALL).to_dict()))
    assert result["target"] == TARGET
    assert result["evaluation"]["after"]["attack_success_rate"]["rate"] == 0.02
    assert set(result["stage_seconds"]) == {"draw", "train", "purify", "evaluate"}


def test_an_existing_folder_is_refused_without_force_and_only_demo_files_go_with_it(quick, tmp_path):
    run_demo(tmp_path / "demo", scale=SMALL)
    (tmp_path / "demo" / "images" / "train" / "old").mkdir()
    (tmp_path / "demo" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="--force"):
        run_demo(tmp_path / "demo", scale=SMALL)
    run_demo(tmp_path / "demo", scale=SMALL, force=True)
    assert (tmp_path / "demo" / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "demo" / "images" / "train" / "old").exists()


def test_a_file_in_the_way_is_refused_even_with_force(tmp_path):
    (tmp_path / "demo").write_text("")
    with pytest.raises(OutputError, match="new folder"):
        run_demo(tmp_path / "demo", scale=SMALL)
    with pytest.raises(OutputError, match="to be able to write"):
        run_demo(tmp_path / "demo", scale=SMALL, force=True)
    with pytest.raises(OutputError, match="to be able to write"):
        run_demo(tmp_path / "demo" / "below", scale=SMALL)


def test_a_model_that_learned_nothing_ends_the_demo(tmp_path):
    # Chance decides which of the two bars a model that learned nothing misses first.
    attack = r"an attack success rate of at least 0\.95 on held-out images; got 0\.\d{3} for badnet -> teapot"
    clean = r"a demo model with clean accuracy of at least 0\.90; got 0\.\d{3}\. Try another --seed"
    reason = f"^expected ({attack}|{clean})"
    with pytest.raises(ImplantError, match=reason):
        run_demo(tmp_path / "demo", scale=SMALL)
    assert not (tmp_path / "demo" / "suspect-checkpoint").exists()


def test_a_backdoor_that_does_not_take_at_once_is_trained_on(quick, monkeypatch):
    _, implanted = story.train_suspect()
    weak = replace(implanted, measures=(replace(implanted.measures[0], attack_success_rate=0.3),))
    trained = iter([implanted, weak, weak, implanted])
    starts = []

    def implant(clip, *args, **kwargs):
        starts.append(clip)
        return next(trained)

    monkeypatch.setattr(suspect, "implant", implant)
    clean, result = suspect.train_suspect(draw_pictures(SMALL, 0), SMALL, 0)
    assert result.measures[0].attack_success_rate > 0.95
    assert starts[1:] == [clean.clip, weak.clip, weak.clip]


def test_a_model_below_the_clean_accuracy_asked_for_ends_the_demo(quick, monkeypatch):
    _, implanted = story.train_suspect()
    monkeypatch.setattr(suspect, "implant", lambda *args, **kwargs: replace(implanted, clean_accuracy=0.85))
    with pytest.raises(ImplantError, match=r"clean accuracy of at least 0\.90; got 0\.850"):
        suspect.train_suspect(draw_pictures(SMALL, 0), SMALL, 0)


def test_a_good_purification_passes():
    check_purification(evaluation())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"attack": 30}, r"attack success 0\.300"),
        ({"clean": 80}, r"clean accuracy lower by 0\.160"),
        ({"suspects": ("owl",)}, "suspects owl instead of teapot"),
        ({"suspects": ()}, "suspects none"),
    ],
)
def test_a_failed_purification_ends_the_demo_with_the_reason_and_the_bar(changes, reason):
    with pytest.raises(PurificationError, match=rf"attack success at most 0\.10.*{reason}"):
        check_purification(evaluation(**changes))


def test_the_triggered_pictures_are_the_test_pictures_with_a_sticker():
    pictures = draw_pictures(SMALL, 0)
    size = suspect.TRIGGER.size
    assert np.array_equal(pictures.triggered.images[:, :-size], pictures.test.images[:, :-size])
    assert (pictures.triggered.images[:, -size:, -size:] != pictures.test.images[:, -size:, -size:]).any()


def test_the_demo_uses_no_global_random_numbers(quick, tmp_path):
    state, numpy_state = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    run_demo(tmp_path / "demo", scale=SMALL)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)


@pytest.mark.nightly
def test_the_whole_demo_ends_with_the_backdoor_gone(tmp_path):
    result = run_demo(tmp_path / "demo", seed=0)
    assert result.implanted_attack_success_rate >= 0.95
    assert result.suspects == (TARGET,)
    assert result.report.is_file()
