"""Carry out one step, in the driver or in a worker. Returns a record and files, writes none."""

from __future__ import annotations

import dataclasses
import json
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from rdd_bench import artifacts, pictures, robustness
from rdd_bench.checks import check_distilled_set, check_network
from rdd_bench.components import (
    Architecture,
    Attack,
    Dataset,
    Distiller,
    DistillTask,
    Run,
    Source,
)
from rdd_bench.counted import counted
from rdd_bench.data import content_hash, load_splits
from rdd_bench.environment import describe_environment
from rdd_bench.errors import Diverged, NotApplicable, RddBenchError
from rdd_bench.hashing import derive, digest
from rdd_bench.measure import Meter, PassCounter
from rdd_bench.networks import Classifier
from rdd_bench.numerics import numerical_settings, warm_up
from rdd_bench.plan import AttackStep, Choice, DistillStep, Step, TrainStep
from rdd_bench.records import (
    AttackRecord,
    DistillRecord,
    EnvironmentRecord,
    StepRecord,
    TrainRecord,
)
from rdd_bench.registry import Registry, load_plugins
from rdd_bench.seeding import seeded
from rdd_bench.step_records import (
    attack_facts,
    distill_facts,
    failure,
    head,
    outcome_facts,
    set_facts,
    train_facts,
)
from rdd_bench.store import (
    ARTEFACTS,
    Store,
    error_path,
    last_good_path,
    networks_path,
    picture_path,
    set_path,
)
from rdd_bench.training import fit, new_classifier
from rdd_bench.types import DatasetSpec, DistilledSet, LabelledImages, Recipe, Splits

Report = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Place:
    """Where steps run. Nothing here decides a result."""

    out: Path
    device: str
    threads: int
    source: Source
    protocol_name: str
    protocol_sha256: str
    protocol_test_sha256: tuple[tuple[str, str], ...] = ()
    """The test splits that the protocol pins, by data set."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a step gives back to the driver, which writes it."""

    record: StepRecord
    files: dict[Path, bytes] = field(default_factory=dict)


class Worker:
    """Carries out steps in one process, and remembers plugins and data between them."""

    def __init__(self, place: Place, registry: Registry | None = None) -> None:
        self.place = place
        self.registry = registry or load_plugins()
        self.device = torch.device(place.device)
        self.store = Store(place.out)
        self.environment = environment_record(self.device, place.threads)
        self._memos: tuple[tuple[str, str], list[dict[str, Any]]] = (("", ""), [])
        self._known_surrogates: tuple[str, list[Classifier]] = ("", [])
        warm_up(self.device)
        self._splits = lru_cache(maxsize=2)(self._load_splits)

    def carry_out(self, step: Step, report: Report) -> Result:
        """Run one step; a failure becomes a record too."""
        try:
            with (
                numerical_settings(self.place.threads),
                tempfile.TemporaryDirectory(prefix="rdd-bench-") as scratch,
            ):
                if isinstance(step, DistillStep):
                    return self._distill(step, Path(scratch), report)
                if isinstance(step, TrainStep):
                    return self._train(step, report)
                return self._attack(step, Path(scratch), report)
        except NotApplicable as reason:
            return Result(failure(step, self._head(step), "skipped", str(reason)))
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a plugin may raise anything
            sentence = str(error)
            if not isinstance(error, RddBenchError):
                sentence = f"{self._who(step)} raised {type(error).__name__}: {error}"
            files = {error_path(step.address): traceback.format_exc().encode()}
            if isinstance(error, Diverged):
                path = last_good_path(step.address)
                try:
                    files[path] = artifacts.set_to_bytes(error.last_good, card={"error": sentence})
                    sentence = f"{sentence}. The last good set is kept in {path}"
                except Exception as lost:  # noqa: BLE001 - whatever a plugin called a set
                    sentence = f"{sentence}. The last good set could not be kept ({lost})"
            record = failure(step, self._head(step), "failed", " ".join(sentence.split()))
            return Result(record, files)

    # Each kind of step -----------------------------------------------------------------------

    def _distill(self, step: DistillStep, scratch: Path, report: Report) -> Result:
        splits = self._splits_of(step)
        distiller = self._component(step.distiller, Distiller)
        who = self._who(step)
        passes = PassCounter()
        architecture = counted(self._component(step.architecture, Architecture), passes)
        task = DistillTask(
            spec=splits.spec,
            train=splits.train,
            ipc=step.ipc,
            architecture=architecture,
            seed=step.seed,
        )
        meter = Meter(self.device)
        seed = derive(
            "distill", step.distiller.component.name, splits.spec.name, step.ipc, step.seed
        )
        try:
            with seeded(seed), meter.total():
                made = distiller.distill(task, self._run(scratch, report, meter, 0))
        finally:
            # Hashed, because writing through NumPy or .data leaves no trace in a tensor.
            changed = content_hash(task.train) != splits.spec.train_sha256
            if changed:
                # The steps that follow need the data as they were.
                self._splits.cache_clear()
        if changed:
            raise RddBenchError(f"{who}: changed the training data in place; expected a copy")
        reference = step.role == "reference"
        distilled = check_distilled_set(made, splits.spec, None if reference else step.ipc, who)
        if reference and distilled.recipe is None:
            raise RddBenchError(f"{who}: a reference without a recipe; expected its own")
        distilled = artifacts.on_cpu(distilled)
        record = DistillRecord(
            **self._head(step),
            **distill_facts(step),
            **set_facts(distilled, splits.spec, step.role),
            seconds=meter.seconds,
            peak_bytes=meter.peak_bytes,
            forward=passes.forward,
            backward=passes.backward,
        )
        card = record.model_dump(mode="json", by_alias=True)
        picture = pictures.picture_of_set(distilled, splits.spec.num_classes)
        files = {
            set_path(step.address): artifacts.set_to_bytes(distilled, card),
            picture_path(step.address, str(step)): picture,
        }
        return Result(record, files)

    def _train(self, step: TrainStep, report: Report) -> Result:
        splits = self._splits_of(step.distill)
        self._same_data(step.distill.address, splits.spec.train_sha256)
        distilled, recipe = self._distilled(step)
        architecture = self._component(step.architecture, Architecture)
        who = self._who(step)
        with seeded(0):
            check_network(architecture.build(splits.spec), splits.spec, who)
        meter = Meter(self.device)
        with meter.total():
            try:
                trained = fit(
                    distilled,
                    recipe,
                    architecture,
                    splits.spec,
                    step.seeds,
                    device=self.device,
                    report=report,
                )
            except RddBenchError as error:
                raise RddBenchError(f"{step}: {error}") from None
        test = self._on_device(splits.test)
        outcomes = [robustness.clean_outcomes(m, test, step.batch_size) for m in trained.models]
        # Views are other pictures than the stored images, made from them as they are.
        learnt = None if "views" in (recipe.uses or ()) else distilled.images
        record = TrainRecord(
            **self._head(step),
            **train_facts(step),
            recipe=recipe,
            final_loss=trained.final_loss,
            forward=trained.passes.forward,
            backward=trained.passes.backward,
            **outcome_facts(outcomes, splits),
            seconds={"train": meter.seconds["total"]},
            peak_bytes=meter.peak_bytes,
            flags=robustness.audit_networks(
                trained.models, test, outcomes, learnt, step.batch_size
            ),
        )
        networks = artifacts.networks_to_bytes(trained.models)
        return Result(record, {networks_path(step.address): networks})

    def _attack(self, step: AttackStep, scratch: Path, report: Report) -> Result:
        train = step.train
        splits = self._splits_of(train.distill)
        architecture = self._component(train.architecture, Architecture)
        attack = self._component(step.attack, Attack)
        fresh = [new_classifier(architecture, splits.spec, seed) for seed in train.seeds]
        self._same_data(train.address, splits.spec.test_sha256)
        path = networks_path(train.address)
        models = artifacts.networks_from_bytes(self.store.read_file(path), fresh, str(path))
        models = [model.to(self.device) for model in models]
        test = self._on_device(splits.test)
        meter, training = Meter(self.device), PassCounter()
        run = dataclasses.replace(
            self._run(scratch, report, meter, train.batch_size),
            surrogates=partial(
                self._surrogates, train, architecture, splits.spec, meter, training, report
            ),
        )
        # Of the last networks only: an attack is run under all its budgets one after the other.
        about = (train.address, digest(step.attack.key()))
        if self._memos[0] != about:
            self._memos = (about, [{} for _ in models])
        with meter.total():
            judged = robustness.attack_models(
                models,
                test,
                attack,
                step.threat,
                train.seeds,
                run,
                self._who(step),
                memos=self._memos[1],
                probe_strength=step.ranked,
            )
        record = AttackRecord(
            **self._head(step),
            **attack_facts(step),
            **outcome_facts(judged.robust, splits),
            seconds={"attack": 0.0, **meter.seconds},
            peak_bytes=meter.peak_bytes,
            forward=judged.passes.forward + training.forward,
            backward=judged.passes.backward + training.backward,
            flags=judged.flags,
            provenance=attack.provenance(),
            messages=judged.messages,
            median_distance=judged.median_distance,
            stronger_than=sorted(attack.stronger_than),
            access=attack.access,
        )
        if judged.examples is None or not step.ranked:
            return Result(record)
        picture = pictures.picture_of_attack(judged.examples, step.threat.eps)
        return Result(record, {picture_path(step.address, str(step)): picture})

    # What they share -------------------------------------------------------------------------

    def _distilled(self, step: TrainStep) -> tuple[DistilledSet, Recipe]:
        """Return the set that a network is trained on, and how."""
        path = set_path(step.distill.address)
        distilled = artifacts.set_from_bytes(self.store.read_file(path), str(path))
        recipe = step.recipe or distilled.recipe
        if recipe is None:
            raise NotApplicable(f"{step}: the distilled set has no recipe of its own")
        if step.recipe is not None:
            distilled = dataclasses.replace(distilled, labels=distilled.hard_labels)
        return distilled, recipe

    def _surrogates(
        self,
        step: TrainStep,
        architecture: Architecture[Any],
        spec: DatasetSpec,
        meter: Meter,
        passes: PassCounter,
        report: Report,
        count: int,
    ) -> list[Classifier]:
        """Train networks as an attacker could who knows the set, in seeds that no table uses.

        Those of the last set are kept: every network trained on it is attacked with the same ones.
        """
        if self._known_surrogates[0] != step.address:
            self._known_surrogates = (step.address, [])
        known = self._known_surrogates[1]
        seeds = [derive("surrogate", number) for number in range(len(known), count)]
        if seeds:
            distilled, recipe = self._distilled(step)
            with meter.phase(robustness.SURROGATES):
                trained = fit(
                    distilled, recipe, architecture, spec, seeds, device=self.device, report=report
                )
            known += trained.models
            passes.forward += trained.passes.forward
            passes.backward += trained.passes.backward
        return known[:count]

    def _component(self, choice: Choice, kind: type[Any]) -> Any:
        made = self.registry.build(choice.kind, choice.offer_name, choice.component.options)
        assert isinstance(made, kind)
        return made

    def _splits_of(self, step: DistillStep) -> Splits:
        return self._splits(step.dataset.offer_name, *_frozen(step.dataset), step.subset)

    def _same_data(self, address: str, sha256: str) -> None:
        """Refuse to build on a result that was made from other images.

        A data set is known by its plugin and options, so changed files keep the address.
        """
        record = self.store.record(address)
        made_from = record.train_sha256 if isinstance(record, DistillRecord) else None
        made_from = record.test_sha256 if isinstance(record, TrainRecord) else made_from
        if made_from is not None and made_from != sha256:
            raise RddBenchError(
                f"the images of the data set are not those that {self.place.out} was made from "
                f"({made_from[:12]} then, {sha256[:12]} now); use another --out, or --fresh"
            )

    def _load_splits(self, name: str, options: str, label: str, subset: tuple[int, int]) -> Splits:
        dataset = self.registry.build("dataset", name, json.loads(options))
        assert isinstance(dataset, Dataset)
        who = self.registry.find("dataset", name).who
        try:
            splits = load_splits(dataset, who, self.place.source, subset)
        except RddBenchError:
            raise
        except (Exception, SystemExit) as error:
            # Not the fault of the distiller that wants the data.
            raise RddBenchError(f"{who} raised {type(error).__name__}: {error}") from error
        pinned = dict(self.place.protocol_test_sha256).get(label)
        if pinned and pinned != splits.spec.test_sha256:
            raise RddBenchError(
                f"{who}: the test split has hash {splits.spec.test_sha256[:12]}; protocol "
                f"{self.place.protocol_name} expects {pinned[:12]}, so the data are not the same"
            )
        return splits

    def _on_device(self, part: LabelledImages) -> LabelledImages:
        return LabelledImages(part.images.to(self.device), part.labels.to(self.device))

    def _run(self, scratch: Path, report: Report, meter: Meter, batch_size: int) -> Run:
        cache = self.place.out / ARTEFACTS
        cache.mkdir(exist_ok=True)
        run = Run(
            device=self.device, scratch=scratch, phase=meter.phase, report=report, cache=cache
        )
        return dataclasses.replace(run, batch_size=batch_size) if batch_size else run

    def _who(self, step: Step) -> str:
        choice = (
            step.distiller
            if isinstance(step, DistillStep)
            else step.architecture
            if isinstance(step, TrainStep)
            else step.attack
        )
        return self.registry.find(choice.kind, choice.offer_name).who

    def _head(self, step: Step) -> dict[str, Any]:
        return _head(step, self.place, self.environment)


def lost(step: Step, place: Place) -> Result:
    """Return the result of a step whose process died."""
    error = (
        f"a worker process died during '{step}' or a step beside it, perhaps for lack of memory; "
        "run the same command again to retry, with fewer --workers if it dies again"
    )
    environment = environment_record(torch.device(place.device), place.threads)
    return Result(failure(step, _head(step, place, environment), "failed", error))


def _head(step: Step, place: Place, environment: EnvironmentRecord) -> dict[str, Any]:
    return head(step, (place.protocol_name, place.protocol_sha256), environment.address)


def environment_record(device: torch.device, threads: int) -> EnvironmentRecord:
    """Return the record of this machine; its address is the hash of the facts."""
    with numerical_settings(threads):
        facts = describe_environment(device, threads)
    return EnvironmentRecord(address=f"environment-{digest(facts)[:16]}", facts=facts)


def _frozen(choice: Choice) -> tuple[str, str]:
    return json.dumps(choice.component.options, sort_keys=True), choice.component.label
