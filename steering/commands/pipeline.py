"""`trimtab fit` and `trimtab distill`: from a task to a correction's folder, stage by stage.

    rollouts -> select -> features -> a route (routes.py): candidates -> validate (choose one)
             -> controls -> report on held-out problems -> correction.json, report.md

Invariant: each stage reads what the one before it wrote, writes files whole or not at all, and does nothing that is
done. So a killed run, started again, continues; and `correction.json` exists only when everything before it does.

    DIR/correction.json, its tier's other files, report.md      what ships
    DIR/controls/<kind>/                                        what it was compared with: `trimtab eval` finds them
    DIR/lora/                                                   via lora: the teacher, as a PEFT folder
    DIR/run/                                                    the work; may be deleted afterwards
    DIR/run/timings.json                                        seconds by stage
"""

import dataclasses
import shutil
from collections.abc import Callable, Sequence, Set
from pathlib import Path
from typing import Any

import torch

from trimtab.errors import Diverged, TaskError
from trimtab.server.model.base import Base
from trimtab.steering.adapter import CONFIG_FILE, WEIGHTS_FILE
from trimtab.steering.atomic import read_json, write_bytes, write_json, write_text
from trimtab.steering.bank import Bank
from trimtab.steering.commands.begin import Problems, begin, place, split
from trimtab.steering.commands.setting import learned_of
from trimtab.steering.correction import Correction
from trimtab.steering.evaluation import report as reports
from trimtab.steering.evaluation.evaluate import Policy, answer, summarise
from trimtab.steering.folder import JSON_FILE, is_saved, load, save
from trimtab.steering.machine import describe, ran_on
from trimtab.steering.tasks.problem import Problem
from trimtab.steering.tasks.tasks import Task, digest_of
from trimtab.steering.training.claim import claim, describe_run, score_again
from trimtab.steering.training.clock import Clock
from trimtab.steering.training.config import FREE, FitConfig
from trimtab.steering.training.features import Features, cache_features
from trimtab.steering.training.journal import Rollout
from trimtab.steering.training.lock import hold
from trimtab.steering.training.progress import say
from trimtab.steering.training.rollouts import Exam, Sampling, collect, open_core
from trimtab.steering.training.routes import SELECT, Route, choose_route
from trimtab.steering.training.selection import Item
from trimtab.steering.training.study import Study
from trimtab.steering.training.teacher import correction_of


def run(config: FitConfig, out: Path, base: Base, task: Task, teacher: Base | None = None) -> Correction:
    """Fit, judge and save a correction; continue if `out` holds an unfinished run of the same config.

    teacher: the config's, loaded, where it names one. Raises InvalidRequest while another process writes to `out`."""
    with hold(out):
        return _run(config, out, base, task, teacher)


def _run(config: FitConfig, out: Path, base: Base, task: Task, teacher: Base | None) -> Correction:
    config = dataclasses.replace(config, name=config.name or out.resolve().name)
    torch.set_num_threads(config.threads)
    work = out / "run"
    problems = split(task, config)
    begin(work, config, base, task, problems, teacher)
    made = None if config.teacher is None else correction_of(config.teacher)
    taught = (made and learned_of(made)) or []  # by heart, perhaps, and passed on
    if is_saved(out):  # written last; since then it may have been calibrated
        say("fit", f"{out} holds the finished correction; delete its {JSON_FILE} to have it judged and written again")
        return load(out)
    clock = Clock(work / "timings.json", ran_on(base, config.threads))
    with clock.time("rollouts"):
        rollouts = _roll_out(work, config, base, task, problems.training)
    items = SELECT[config.via](rollouts, config)
    with clock.time("features"):
        features = _learn_from(work, config, base, problems.training, items)
    used = {item.problem for item in items}
    learned = [problem for problem in problems.training if problem.id in used]
    study = Study(config, base, task, learned, items, features, work, clock, _mean_rewards(rollouts, used))
    route = choose_route(study, teacher)
    candidates = _keep(work / "candidates", route.candidates)
    with clock.time("validation"):
        chosen = _choose(work, config, base, task, problems.validation, candidates)
    controls, lacking = _fit_controls(work, route, chosen)
    correction = dataclasses.replace(chosen, name=config.name)
    exam = Exam(task, problems.test, _sampling(config, config.test_samples), config.slots, config.threads)
    judged = reports.Judged(correction, controls, route.teacher, lacking=lacking)
    with clock.time("report"):
        report = reports.make(base, exam, judged, work / "report")
    provenance = _provenance(route, config, base, task, problems, rollouts, features, chosen, taught)
    shipped = dataclasses.replace(correction, report=report, provenance=provenance)
    write_text(out / "report.md", reports.to_markdown(report))
    for control in controls:
        save(control, out / "controls" / control.name)
    if config.via == "lora":  # a PEFT folder of its own; of the tier lora, `out` itself is one
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            write_bytes(out / "lora" / name, (work / "lora" / name).read_bytes())
    save(shipped, out)
    say("timings", f"{clock}; on {ran_on(base, config.threads)}")
    say("fit", f"{config.name} is in {out}: {report['verdict']['summary']}")
    return shipped


def _roll_out(work: Path, config: FitConfig, base: Base, task: Task, problems: Sequence[Problem]) -> list[Rollout]:
    core = open_core(base, Bank(base.hidden, base.device), problems, config.max_tokens, config.slots, config.threads)
    sampling, folder = _sampling(config, config.samples), work / "rollouts"
    claim(folder, describe_run(core, problems, sampling))
    if not (work / "features").exists():  # nothing was learned from them yet
        score_again(task, problems, folder)
    return collect(core, task, problems, sampling, folder, "rollouts")


def _learn_from(
    work: Path, config: FitConfig, base: Base, problems: Sequence[Problem], items: Sequence[Item]
) -> Features:
    kept = {item.problem for item in items}
    say("select", f"{len(kept)} of {len(problems)} problems and {len(items)} of their completions are learned from")
    features = cache_features(base, {problem.id: problem for problem in problems}, items, config, work / "features")
    share = int(features.gated.sum()) / sum(len(item.tokens) for item in items)
    say("features", f"the gate opens at {int(features.gated.sum())} positions, {share:.0%} of those read")
    fitted = int((features.gated & ~features.held_out).sum())
    measured = int(((features.acts if config.via == "direct" else features.gated) & features.held_out).sum())
    if not fitted or not measured:  # before hours of learning
        raise TaskError(
            f"no position to learn from ({fitted} fitted, {measured} held out): the model is seldom above tau "
            f"{config.tau:g}; lower --tau, and delete all in {work} but its rollouts"
        )
    return features.to(base.device)


def _mean_rewards(rollouts: Sequence[Rollout], problems: Set[str]) -> dict[str, float]:
    """Of each problem."""
    found: dict[str, list[float]] = {}
    for rollout in rollouts:
        if rollout.problem in problems:
            found.setdefault(rollout.problem, []).append(rollout.reward)
    return {problem: sum(rewards) / len(rewards) for problem, rewards in found.items()}


def _keep(folder: Path, make: Callable[[], list[Correction]]) -> list[Correction]:
    """What `make` made, now or in an earlier run."""
    path = folder.with_suffix(".json")
    if not path.exists():
        made = make()
        for correction in made:
            save(correction, folder / correction.name)
        write_json(path, [correction.name for correction in made])
    return [load(folder / name) for name in read_json(path)]


def _choose(
    work: Path, config: FitConfig, base: Base, task: Task, problems: Sequence[Problem], candidates: list[Correction]
) -> Correction:
    """The candidate that does best on the validation problems; of equals, the one that changes least."""
    if len(candidates) == 1:
        return candidates[0]
    bank = Bank(base.hidden, base.device)
    bank.add(*candidates)
    exam = Exam(task, problems, _sampling(config, config.validation_samples), config.slots, config.threads)
    policies = [Policy("base"), *(Policy(candidate.name, candidate.name) for candidate in candidates)]
    found = answer(exam.open(base, bank), exam, policies, work / "validation")
    rates = {name: summarise(name, problems, rollouts).pass_at_1 for name, rollouts in found.items()}
    chosen = max(candidates, key=lambda c: (rates[c.name], -c.provenance["kl"]))
    shown = ", ".join(f"{name} {rate:.3f}" for name, rate in rates.items())
    say("validation", f"{shown}: chose {chosen.name}")
    return dataclasses.replace(chosen, provenance={**chosen.provenance, "validation": rates})


def _fit_controls(work: Path, route: Route, chosen: Correction) -> tuple[list[Correction], dict[str, str]]:
    """And why each of those that could not be made was not: the correction is judged without it."""
    tried = {kind: _control(work / "controls" / kind, route, kind, chosen.provenance["kl"]) for kind in route.controls}
    found = [control for control in tried.values() if isinstance(control, Correction)]
    return found, {kind: why for kind, why in tried.items() if isinstance(why, str)}


def _control(folder: Path, route: Route, kind: str, kl: float) -> Correction | str:
    """A control, or why it could not be made; of an earlier run where that made it for the same KL, which is that of
    another candidate where validation was scored otherwise since."""
    failed = folder.with_suffix(".json")
    if is_saved(folder):
        made = load(folder)
        if made.provenance["kl_wanted"] == kl:
            return made
    elif failed.exists():
        told = read_json(failed)
        if isinstance(told, dict) and told["kl_wanted"] == kl:  # it was a text alone once
            return str(told["why"])
    try:
        made = route.control(kind, kl)
    except Diverged as error:  # the correction is none the worse for it
        say(kind, f"the control could not be made: {error}")
        shutil.rmtree(folder, ignore_errors=True)
        write_json(failed, {"kl_wanted": kl, "why": str(error)})
        return str(error)
    shutil.rmtree(folder, ignore_errors=True)  # of a kill between two files, the old one and the new would not match
    save(made, folder)
    return made


def _sampling(config: FitConfig, samples: int) -> Sampling:
    return Sampling(samples, config.seed, config.temperature, config.top_p, config.max_tokens)


def _provenance(
    route: Route,
    config: FitConfig,
    base: Base,
    task: Task,
    problems: Problems,
    rollouts: Sequence[Rollout],
    features: Features,
    chosen: Correction,
    taught: Sequence[str],
) -> dict[str, Any]:
    """How the correction was made. No times of day: equal runs make equal files."""
    training = features.at(features.gated & ~features.held_out)
    return {
        "method": route.method,
        "config": {name: value for name, value in dataclasses.asdict(config).items() if name not in FREE},
        "task": task.name,
        "problems_sha256": problems.digest,
        "learned": sorted({*map(digest_of, [*problems.training, *problems.validation]), *taught}),
        "judged": sorted(map(digest_of, problems.test)),
        "rollouts": len(rollouts),
        "pass_rate": sum(r.reward for r in rollouts) / len(rollouts),
        **({} if config.via == "teacher" else {"mixed_problems": len(set(features.problem.tolist()))}),
        "positions": len(training.h),
        "fit": dict(chosen.provenance),
        **place(base),
        "threads": config.threads,
        "machine": describe(),
    }
