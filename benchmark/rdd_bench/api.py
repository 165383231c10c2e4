"""Everything a plugin may import. Names are added in minor versions and removed in major ones."""

from __future__ import annotations

from rdd_bench.augment import draw as draw_augmentation
from rdd_bench.components import (
    Architecture,
    Attack,
    Component,
    Dataset,
    Distiller,
    DistillTask,
    NoOptions,
    Run,
    Source,
    embedding_of,
)
from rdd_bench.errors import Diverged, NotApplicable, RddBenchError
from rdd_bench.foreign import ForeignSet, read_set, unfold
from rdd_bench.hookspecs import hookimpl
from rdd_bench.seeding import seeded
from rdd_bench.threats import ascend, distance, project, random_start
from rdd_bench.types import (
    AdversarialTraining,
    Config,
    DatasetSpec,
    DistilledSet,
    Eps,
    Info,
    LabelledImages,
    Norm,
    Recipe,
    Splits,
    Threat,
    Views,
    Whitening,
)
from rdd_bench.views import render as render_views

__all__ = [
    "AdversarialTraining",
    "Architecture",
    "Attack",
    "Component",
    "Config",
    "Dataset",
    "DatasetSpec",
    "DistillTask",
    "DistilledSet",
    "Distiller",
    "Diverged",
    "Eps",
    "ForeignSet",
    "Info",
    "LabelledImages",
    "NoOptions",
    "Norm",
    "NotApplicable",
    "RddBenchError",
    "Recipe",
    "Run",
    "Source",
    "Splits",
    "Threat",
    "Views",
    "Whitening",
    "ascend",
    "distance",
    "draw_augmentation",
    "embedding_of",
    "hookimpl",
    "project",
    "random_start",
    "read_set",
    "render_views",
    "seeded",
    "unfold",
]
