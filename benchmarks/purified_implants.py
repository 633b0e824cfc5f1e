"""What is left of every implant after purification? Purifies the victims of `implants.py` and measures.

    python benchmarks/purified_implants.py --victims VICTIMS --checkpoint CLEAN --images TRAIN --heldout VAL
    --classes FILE

Purification sees the checkpoint, the class names, 16 + 8 training images per class and the clean model that
the victims came from as `--reference`, nothing else. What the same search says without the reference is
judged beside it (`alone`); where both name the same targets, the head is the same. Then every trigger is put
on all validation images; the clean model is measured on the same images, as the ceiling of PA. Writes
`purified` into the victims' entries of results/implants.json and prints the table; victims that have an entry
are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from detection import suspected, without_reference

from cbpt_runtime.bundle import Evidence
from cbpt_runtime.cli.output import shown_progress
from cbpt_runtime.evaluation import Evaluation, HeadRates, evaluate_all
from cbpt_runtime.models.class_lists import read_class_list
from cbpt_runtime.models.data import ClassList, default_templates
from cbpt_runtime.pipeline import purify_checkpoint
from cbpt_runtime.purification import search
from cbpt_runtime.purification.cbpt import Cbpt
from cbpt_runtime.redteam.triggers import load_trigger
from cbpt_runtime.report import render_evaluation, write_page

RESULTS = Path(__file__).parent / "results" / "implants.json"
RATES = ("clean_accuracy", "attack_success_rate", "poisoned_accuracy", "floor", "target_recall")


def main() -> None:
    """Purify what is asked for and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="victims (all in the results)")
    for name in ("victims", "checkpoint", "images", "heldout", "classes"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--reports", type=Path, help="folder for the reports of the evaluations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--table-only", action="store_true", help="only print the table of the results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    known = json.loads(RESULTS.read_text())
    for name in [] if arguments.table_only else arguments.names or sorted(known["victims"]):
        if "purified" not in known["victims"][name]:
            found = purified(name, arguments)
            known = json.loads(RESULTS.read_text())
            known["victims"][name]["purified"] = found
            known["machine"] = {
                "processor": platform.processor() or platform.machine(),
                "usable_cores": len(os.sched_getaffinity(0)),
                "threads": arguments.threads,
            }
            RESULTS.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    print(table(known["victims"]))


def purified(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Purify one victim, then put its own triggers on the validation images."""
    victim = arguments.victims / name
    doors = json.loads((victim / "attack.json").read_text())["backdoors"]
    classes = class_list(arguments.classes, doors)
    triggers = sorted(victim.glob("trigger*.safetensors"))
    with tempfile.TemporaryDirectory() as scratch, shown_progress() as progress:
        judge = JudgeTwice()
        with patch.object(search, "judge", judge):
            bundle = purify_checkpoint(
                victim,
                classes,
                arguments.images,
                Path(scratch) / "bundle",
                method=Cbpt(seed=arguments.seed),
                reference=arguments.checkpoint,
                device="cpu",
                progress=progress,
            )
        attacks = []
        for door, path in zip(doors, triggers, strict=True):
            pair = evaluate_all(
                [bundle, arguments.checkpoint],
                arguments.heldout,
                target=door["target"],
                attack=load_trigger(path),
                seed=arguments.seed,
                device="cpu",
                progress=progress,
            )
            attacks.append({"attack": door["attack"], "target": door["target"], **rates(*pair)})
            if arguments.reports is not None:
                write_page(
                    arguments.reports / f"{name}-{path.stem}.html", render_evaluation(pair), force=True
                )
        if not doors:
            (alone,) = evaluate_all([bundle], arguments.heldout, device="cpu", progress=progress)
            attacks.append({"before": plain(alone.before), "after": plain(alone.after)})
    suspects = [suspect.name for suspect in bundle.suspects]
    targets = [door["target"] for door in doors]
    return {
        "verdict": bundle.verdict,
        "suspects": suspects,
        "targets_found": [target for target in targets if target in suspects],
        "falsely_suspected": [name for name in suspects if name not in targets],
        "p_values": foremost(bundle.evidence, targets),
        "alone": {"suspects": judge.suspects, "p_values": foremost(judge.evidence, targets)},
        "config": Cbpt(seed=arguments.seed).to_dict(),
        "seconds": round(sum(bundle.manifest["stage_seconds"].values())),
        "attacks": attacks,
    }


class JudgeTwice:
    """Judge a search beside the reference, as always, and note what it says without."""

    def __init__(self) -> None:
        self.judge = search.judge
        self.suspects: list[str] = []
        self.evidence = Evidence()

    def __call__(
        self, suspect: search.SearchInput, reached: list[search.Reach], level: float
    ) -> search.SearchResult:
        """Return the verdict beside the reference."""
        found = self.judge(suspect, without_reference(reached), level)
        self.suspects = [named["name"] for named in suspected(found, suspect.vocabulary)]
        self.evidence = found.evidence(suspect.vocabulary)
        return self.judge(suspect, reached, level)


def foremost(evidence: Evidence, targets: list[str]) -> list[dict[str, Any]]:
    """Return the three most suspicious concepts, and the targets' own."""
    return [
        {key: getattr(concept, key) for key in ("word", "p_value", "family", "score", "success")}
        for place, concept in enumerate(evidence.concepts)
        if place < 3 or concept.word in targets
    ]


def class_list(path: Path, doors: list[dict[str, Any]]) -> ClassList:
    """Return the default templates; for a backdoor with a text key, which needs it, with the key in front."""
    key = next((door["text_key"] for door in doors if door["text_key"]), "")
    return read_class_list(path, templates=[key + template for template in default_templates()])


def rates(bundle: Evaluation, clean: Evaluation) -> dict[str, Any]:
    """Both heads, the clean model on the same images, and the alarm."""
    alarm = bundle.to_dict()["alarm"]
    return {
        "before": plain(bundle.before),
        "after": plain(bundle.after),
        "clean_model": plain(clean.before),
        "alarm": alarm,
    }


def plain(head: HeadRates | None) -> dict[str, float | None]:
    """Return the plain shares of one head."""
    found = {name: getattr(head, name) for name in RATES}
    return {name: None if rate is None else rate.rate for name, rate in found.items()}


def table(victims: dict[str, Any]) -> str:
    """One row per backdoor, as Markdown."""
    columns = "victim → target, implant: ASR, implant: CA, bars met, target found beside the clean model"
    columns += ", alone, CA, ASR, floor, PA, recall, alarm AUROC"
    lines = ["| " + columns.replace(", ", " | ") + " |", "|" + "---|" * 12]
    for name, victim in sorted(victims.items()):
        found = victim.get("purified")
        doors = victim["backdoors"] or [{"attack": "none", "target": "–"}]
        for index, door in enumerate(doors):
            cells = [f"`{name}` → {door['target']}", share(door.get("attack_success_rate"))]
            cells += [share(victim["clean_accuracy"]), "yes" if victim["took"] else "**no**"]
            cells += purified_cells(found, index, door["target"]) if found else ["–"] * 8
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def purified_cells(found: dict[str, Any], index: int, target: str) -> list[str]:
    """Return the cells of the purified head; PA in brackets: the clean model on the same images."""
    attack = found["attacks"][index]
    before, after = attack["before"], attack["after"]
    accuracy = f"{share(before['clean_accuracy'])} → {share(after['clean_accuracy'])}"
    verdicts = [verdict(found, one, target) for one in (found, found["alone"])]
    if target == "–":
        return [*verdicts, accuracy, *["–"] * 5]
    auroc = "–" if attack["alarm"] is None else f"{attack['alarm']['auroc']['value']:.3f}"
    return [
        *verdicts,
        accuracy,
        f"{share(before['attack_success_rate'])} → {share(after['attack_success_rate'])}",
        share(after["floor"]),
        f"{share(after['poisoned_accuracy'])} ({share(attack['clean_model']['poisoned_accuracy'])})",
        f"{share(before['target_recall'])} → {share(after['target_recall'])}",
        auroc,
    ]


def verdict(found: dict[str, Any], judged: dict[str, Any], target: str) -> str:
    """Whether a target is named, with the p-value of the most suspicious word, and what is named besides."""
    targets = [attack.get("target") for attack in found["attacks"]]
    others = [name for name in judged["suspects"] if name not in targets]
    extra = f", *{', '.join(others)}*" if others else ""
    smallest = f" ({judged['p_values'][0]['p_value']:.0e})"
    if target == "–":
        return ("**suspected**" if judged["suspects"] else "clean") + extra + smallest
    return ("yes" if target in judged["suspects"] else "**no**") + extra + smallest


def share(rate: float | None) -> str:
    """Return a share in percent."""
    return "–" if rate is None else f"{100 * rate:.1f} %"


if __name__ == "__main__":
    main()
