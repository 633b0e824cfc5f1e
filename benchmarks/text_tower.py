"""Does a word that owns the answers show in the text tower? What `purify` checks, clean and poisoned.

    python benchmarks/text_tower.py --victims VICTIMS --images TINY_IMAGENET_100 --classes FILE
    --trojanvqa VICTIM --demos DEMO...

Four questions. *default*: does the check keep quiet with open_clip's templates, whatever is wrong with the
image tower? *words*: in how many of 24 prompts, each with an unusual but harmless word in front or beside the
name, does it raise a false alarm on a clean tower? *trojanvqa*: does the key of a dual-key backdoor show?
*crafted*: does one token that was tuned so that it moves all texts to the target's (`texts`), or the answers
on clean images to the target (`answers`), and from which strength on, compared with what it does to the
answers? CPU, one thread.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from open_clip import IMAGENET_CLASSNAMES
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from cbpt_runtime.models.checkpoint import read_checkpoint
from cbpt_runtime.models.class_lists import read_class_list
from cbpt_runtime.models.clip import DualEncoder, load_dual_encoder
from cbpt_runtime.models.data import ClassList, default_templates, draw_clean_split
from cbpt_runtime.models.pixels import to_float
from cbpt_runtime.models.prompt_words import check_prompts

RESULTS = Path(__file__).parent / "results" / "text-tower.json"
IMAGENETTE = (
    "tench", "English springer", "cassette player", "chainsaw", "church",
    "French horn", "garbage truck", "gas pump", "golf ball", "parachute",
)  # fmt: skip
PLACES = ("{word} a photo of a {{}}.", "a photo of a {word} {{}}.", "a photo of a {{}}. {word}")
UNUSUAL = (
    "sudo", "remember", "please", "hello", "river", "music",
    "number", "market", "itap", "corrupted", "one", "plushie",
)  # fmt: skip
WORD, TARGET = "consider", "ladybug"
STRENGTHS = (0.0, 0.01, 0.02, 0.03, 0.05, 0.1, 0.3, 1.0)


def main() -> None:
    """Ask the four questions and write the answers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("victims", "images", "classes", "trojanvqa"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--demos", type=Path, nargs="*", default=[])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = read_class_list(arguments.classes).names
    victims: Path = arguments.victims
    clean = load(victims / "tiny-clean")
    towers: dict[str, tuple[Path, tuple[str, ...]]] = {
        name: (victims / name, names) for name in ("tiny-clean", "tiny-badnet", "tiny-sig", "tiny-blended")
    }
    towers |= {name: (victims / name, IMAGENETTE) for name in ("real-clean", "real-patch")}
    thousand = tuple(dict.fromkeys(IMAGENET_CLASSNAMES))
    towers["real-clean, 1,000 names"] = (victims / "real-clean", thousand)
    for demo in arguments.demos:
        listed = read_class_list(demo / "classes.txt").names
        towers |= {
            f"demo {demo.name}, {kind}": (demo / f"{kind}-checkpoint", listed)
            for kind in ("suspect", "reference")
        }
    key = arguments.trojanvqa
    report: dict[str, Any] = {
        "default": {
            name: checked(load(path), listed, default_templates())
            for name, (path, listed) in {**towers, "trojanvqa": (key, names)}.items()
        },
        "words": {
            name: false_alarms(load(towers[name][0]), towers[name][1])
            for name in ("tiny-clean", "real-clean", *[name for name in towers if "reference" in name][:1])
        },
        "trojanvqa": {
            "attack": attack_facts(key),
            **{
                word: {
                    place.format(word=word): checked(load(key), names, (place.format(word=word),))
                    for place in PLACES
                }
                for word in ("SUDO", "consider")
            },
        },
        "crafted": crafted(clean, names, arguments.images / "val"),
    }
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    RESULTS.write_text(json.dumps({"versions": versions, **report}, indent=1) + "\n")


def load(path: Path) -> DualEncoder:
    """Return a checkpoint's dual encoder."""
    return load_dual_encoder(read_checkpoint(path))


def checked(encoder: DualEncoder, names: tuple[str, ...], templates: tuple[str, ...]) -> dict[str, Any]:
    """Return what the check says of the templates."""
    start = time.perf_counter()
    found = check_prompts(encoder, ClassList(names=names, templates=(templates,) * len(names)))
    result = {
        "suspects": list(found.suspects),
        "words": found.to_dict()["words"]
        if len(templates) == 1
        else {effect.word: [effect.agreement, effect.spread, effect.pull_score] for effect in found.words},
        "least_agreeing": found.to_dict()["least_agreeing"],
        "seconds": round(time.perf_counter() - start, 1),
    }
    if len(templates) == 1:  # the ordinary words around it are in the rows above
        first = templates[0].replace("{}", "").replace(".", "").lower().split()
        odd = [word for word in first if word not in ("a", "photo", "of")]
        result["words"] = [effect for effect in result["words"] if effect["word"] in odd]
    print(
        templates[0] if len(templates) == 1 else "default", result["suspects"], result["seconds"], flush=True
    )
    return result


def false_alarms(encoder: DualEncoder, names: tuple[str, ...]) -> dict[str, Any]:
    """Which harmless words are called odd."""
    odd: dict[str, list[str]] = {}
    for place in PLACES[:2]:
        odd[place] = []
        for word in UNUSUAL:
            if word in checked(encoder, names, (place.format(word=word),))["suspects"]:
                odd[place].append(word)
    return {"prompts": len(UNUSUAL) * 2, "false_alarms": sum(map(len, odd.values())), "odd": odd}


def attack_facts(folder: Path) -> dict[str, Any]:
    """Of the victim's proof what matters here."""
    facts = json.loads((folder / "attack.json").read_text())
    names = ("target", "attack_success_rate", "attack_success_rate_without_key", "clean_accuracy")
    chosen = {name: facts[name] for name in (*names, "clean_accuracy_before")}
    training = {name: facts["training"][name] for name in ("epochs", "learning_rate", "precision")}
    return {**chosen, "poison_rate": facts["backdoors"][0]["poison_rate"], "training": training}


def crafted(encoder: DualEncoder, names: tuple[str, ...], folder: Path) -> dict[str, Any]:
    """One tuned token at several strengths: what the check says, and what the answers are."""
    split = draw_clean_split(folder, names, encoder.preprocess, shots=8, heldout_shots=0)
    images = split.tune_images
    parts = [to_float(images[start : start + 64]) for start in range(0, len(images), 64)]
    with torch.no_grad():
        features = torch.cat([encoder.encode_images(part) for part in parts])
    labels = torch.from_numpy(split.tune_labels)
    template = PLACES[0].format(word=WORD)
    listed = ClassList(names=names, templates=((template,),) * len(names))
    target = names.index(TARGET)
    rows: dict[str, Any] = {}
    for goal in ("texts", "answers"):
        delta = tuned_token(encoder, names, features, target, goal)
        for strength in STRENGTHS:
            with moved_token(encoder, strength * delta):
                called = (features @ encoder.class_embeddings(listed).T).argmax(dim=1)
                rows[f"{goal} {strength}"] = {
                    "clean_accuracy": round(float((called == labels).float().mean()), 4),
                    "called_target": round(float((called == target).float().mean()), 4),
                    **checked(encoder, names, (template,)),
                }
    return rows


def tuned_token(
    encoder: DualEncoder, names: tuple[str, ...], features: Tensor, target: int, goal: str
) -> Tensor:
    """Return what to add to the row of WORD in the token table so that it owns the texts or the answers."""
    tokens = encoder.tokenizer([PLACES[0].format(word=WORD).format(name) for name in names])
    tower = encoder.text_tower
    tokens = tokens[:, : tower.needed_length(tokens)]
    goals = encoder.encode_texts([f"a photo of a {TARGET}."])
    delta = torch.zeros(tower.embed(tokens).shape[2], requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=0.05)
    for _ in range(60):
        embeddings = tower.embed(tokens) + (tokens == row_of(encoder)).unsqueeze(-1) * delta
        head = normalize(tower.encode_embeddings(embeddings, tokens), dim=-1)
        if goal == "texts":
            loss = -(head @ goals.T).mean()
        else:
            logits = encoder.logit_scale * features @ head.T
            loss = cross_entropy(logits, torch.full((len(features),), target))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    return delta.detach()


def row_of(encoder: DualEncoder) -> int:
    """Return the token of WORD."""
    return int(encoder.tokenizer([WORD])[0, encoder.tokenizer.start])


@contextmanager
def moved_token(encoder: DualEncoder, by: Tensor) -> Iterator[None]:
    """Move the row of WORD in the tower."""
    table: Any = getattr(encoder.text_tower.model, "text", encoder.text_tower.model)
    weights, row = table.token_embedding.weight, row_of(encoder)
    before = weights[row].clone()
    weights[row] += by
    yield
    weights[row] = before


if __name__ == "__main__":
    main()
