"""The adapter changes nothing that the packages compute, and mends what they break.

What our own APGD computes in their place is compared with them in test_apgd.py.
"""

import ast
import contextlib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rdd_bench.api import NotApplicable, RddBenchError, Run, Threat
from rdd_bench_builtin.attacks._autoattack_adapter import (
    PUBLISHED_ITERATIONS,
    Flags,
    _check_square_fits,
    _fit_to_classes,
    _set_iterations,
)
from rdd_bench_builtin.attacks.autoattack import AutoAttack
from rdd_bench_builtin.attacks.pgd import PGD

NAMES = {"linf": "Linf", "l2": "L2"}
BUDGETS = {"linf": 0.1, "l2": 0.6}
BATCH = 40
LITTLE = {"iterations": 3, "square_queries": 5, "seed": 0}

OFFICIAL_IS_THERE = importlib.util.find_spec("autoattack") is not None
NUMERICAL_FILES = {
    "autopgd_base.py": "6913041e2d8e94b72e659c9ea5452eb7d3476f24f32d227cdaae025c6db3c256",
    "fab_base.py": "63654f228a57b5ff56babd6ed3d1ddd0724827e8a210a48ba0d76cbc35333a5b",
    "fab_projections.py": "d2e095000c0ecd85f0eb22605465636487259c57147b4b2bd091c6ea86fb5bde",
    "fab_pt.py": "2ad605c1a161fbdc0109f4018760ffb2a10a63de6e218063bb33621e00013d1e",
    "square.py": "bd5c61d3b43d3b55b74b059477b74061a399a0f5f384cb51af91216682e247ae",
    "other_utils.py": "a06a038ab1ca59a2d8f09642b9a4e7f6e9b249cd8e6c6a9cbd308f47649268df",
}


@pytest.fixture(scope="module")
def trained():
    """Networks for the first k digits, each with 100 test images, some of them misclassified."""
    from sklearn.datasets import load_digits

    data = load_digits()
    made: dict[int, tuple[nn.Module, Tensor, Tensor]] = {}

    def of_classes(classes: int) -> tuple[nn.Module, Tensor, Tensor]:
        if classes not in made:
            chosen = data.target < classes
            images = torch.tensor(data.images[chosen] / 16, dtype=torch.float32).unsqueeze(1)
            labels = torch.tensor(data.target[chosen])
            with torch.random.fork_rng():
                torch.manual_seed(0)
                network = small_network(classes)
                train(network, images[:-100], labels[:-100])
            network.eval().requires_grad_(False)
            # A wrong label makes an image misclassified whatever the network has learnt.
            labels = labels[-100:].clone()
            labels[::25] = (labels[::25] + 1) % classes
            made[classes] = network, images[-100:], labels
        return made[classes]

    return of_classes


def small_network(classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, classes),
    )


def train(network: nn.Module, images: Tensor, labels: Tensor) -> None:
    # By hand, because the first use of torch.optim takes seconds to import.
    velocity = [torch.zeros_like(parameter) for parameter in network.parameters()]
    for _ in range(12):
        order = torch.randperm(len(images))
        for batch in (order[start : start + 64] for start in range(0, len(order), 64)):
            loss = nn.functional.cross_entropy(network(images[batch]), labels[batch])
            gradients = torch.autograd.grad(loss, list(network.parameters()))
            with torch.no_grad():
                for parameter, gradient, speed in zip(
                    network.parameters(), gradients, velocity, strict=True
                ):
                    parameter.sub_(0.05 * speed.mul_(0.9).add_(gradient))


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path)


def make_run(
    tmp_path: Path, report: Callable[[str, int, int], None] = lambda what, done, total: None
) -> Run:
    return Run(
        device=torch.device("cpu"),
        scratch=tmp_path,
        phase=lambda name: contextlib.nullcontext(),
        report=report,
        batch_size=BATCH,
    )


def make(**options: Any) -> Any:
    return AutoAttack.configured(options)


def correct(digits: tuple[Any, Tensor, Tensor], count: int = 100) -> tuple[Any, Tensor, Tensor]:
    network, images, labels = digits
    chosen = (network(images).argmax(1) == labels).nonzero().flatten()[:count]
    return network, images[chosen], labels[chosen]


def directly(
    digits: tuple[Any, Tensor, Tensor],
    norm: str,
    package: str,
    seed: int,
    iterations: int = 100,
    queries: int = 30,
) -> Tensor:
    """Call the package as its documentation says, on right and wrong images alike."""
    network, images, labels = digits
    classes = network(images[:1]).shape[1]
    module: Any = importlib.import_module(package)
    adversary = module.AutoAttack(
        network, norm=NAMES[norm], eps=BUDGETS[norm], seed=seed, device="cpu"
    )
    adversary.verbose = False
    adversary.square.n_queries = queries
    if iterations != 100:
        # Built anew rather than changed, so as not to repeat what the adapter does.
        given = {"norm": NAMES[norm], "eps": BUDGETS[norm], "device": "cpu"}
        given |= {"n_iter": iterations, "n_restarts": 1, "logger": adversary.logger}
        adversary.apgd = type(adversary.apgd)(network, **given)
        adversary.apgd_targeted = type(adversary.apgd_targeted)(network, **given)
        adversary.fab.n_iter = iterations
    adversary.apgd_targeted.n_target_classes = min(9, classes - 1)
    adversary.fab.n_target_classes = min(9, classes - 1)
    if classes == 3:
        adversary.attacks_to_run = ["apgd-ce", "apgd-dlr", "fab-t", "square"]
    logging.getLogger("auto-attack").disabled = True
    try:
        if package == "autoattack":
            result: Tensor = adversary.run_standard_evaluation(images, labels, bs=BATCH)
        else:
            result, _ = adversary.run_standard_evaluation(images, labels, batch_size=BATCH)
    finally:
        logging.getLogger("auto-attack").disabled = False
    return result


def package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


class TestThePackages:
    @pytest.mark.parametrize("file", NUMERICAL_FILES)
    def test_the_numerical_files_are_the_ones_that_were_compared(self, file):
        content = (package_folder("pyautoattack") / file).read_bytes()
        assert hashlib.sha256(content).hexdigest() == NUMERICAL_FILES[file]

    @pytest.mark.skipif(not OFFICIAL_IS_THERE, reason="the authors' package is not installed")
    @pytest.mark.parametrize("file", [name for name in NUMERICAL_FILES if name != "other_utils.py"])
    def test_the_authors_functions_are_the_same(self, file):
        def functions(package: str) -> dict[str, str]:
            tree = ast.parse((package_folder(package) / file).read_text())
            return {
                node.name: ast.dump(node)
                for node in ast.walk(tree)
                if isinstance(node, ast.FunctionDef)
            }

        assert functions("autoattack") == functions("pyautoattack")

    @pytest.mark.parametrize("norm", NAMES)
    def test_both_packages_give_the_same_images(self, norm, trained):
        pytest.importorskip("autoattack")
        digits = trained(10)
        official = directly(digits, norm, "autoattack", seed=5, iterations=20)
        repackaged = directly(digits, norm, "pyautoattack", seed=5, iterations=20)
        assert torch.equal(official, repackaged)


@pytest.mark.parametrize(
    ("classes", "norm", "iterations"),
    [(10, "linf", 15), (10, "l2", 15), (3, "linf", 100), (3, "l2", 15)],
)
def test_equals_the_package_called_directly_on_the_whole_test_set(
    classes, norm, iterations, trained, run
):
    # The standard version with fewer queries of Square. The package sees the misclassified images
    # too; the adapter is handed the others only, as it is by the host.
    network, images, labels = trained(classes)
    images, labels = images[:60], labels[:60]
    expected = directly(
        (network, images, labels), norm, "pyautoattack", seed=7, iterations=iterations
    )
    right = network(images).argmax(1) == labels
    assert 0 < (~right).sum() < 20  # Two batches are left.
    got = images.clone()
    attack = make(seed=7, square_queries=30, iterations=iterations, engine="package")
    threat = Threat(norm, BUDGETS[norm])
    got[right] = attack.perturb(network, images[right], labels[right], threat, run)
    assert torch.equal(got, expected)
    robust = network(got).argmax(1) == labels
    assert torch.equal(robust, network(expected).argmax(1) == labels)
    assert 0 < robust.sum() < right.sum()
    attack = make(seed=7, square_queries=30, iterations=iterations)
    fast = attack.perturb(network, images[right], labels[right], threat, run)
    assert torch.equal(network(fast).argmax(1) == labels[right], robust[right])


STAND_IN = '''
import pyautoattack
from . import checks

class AutoAttack:
    """The interface of the authors' package over the code of the other."""

    def __init__(self, model, norm="Linf", eps=0.3, seed=None, verbose=True, attacks_to_run=[],
                 version="standard", is_tf_model=False, device="cuda", log_path=None):
        self.inner = pyautoattack.AutoAttack(
            model, norm=norm, eps=eps, seed=seed, device=device, version="custom", attacks=[])
        self.apgd, self.fab, self.square = self.inner.apgd, self.inner.fab, self.inner.square
        self.apgd_targeted = self.inner.apgd_targeted
        self.verbose = verbose
        self.attacks_to_run = attacks_to_run
        if version != "custom":
            self.set_version(version)

    def set_version(self, version="standard"):
        if self.verbose:
            print("setting parameters")
        self.inner._set_version(version)
        self.attacks_to_run = self.inner.attacks_to_run

    def run_standard_evaluation(self, x_orig, y_orig, bs=250, return_labels=False):
        if self.verbose:
            print("using the standard version")
        self.logger.log("Warning: a flag. See flags_doc.md")
        self.logger.log("initial accuracy: 100%")
        # The two components log through what the adapter gave them.
        self.apgd.logger = self.apgd_targeted.logger = Both(self.logger)
        self.inner.logger = self.apgd.logger
        self.inner.attacks_to_run = self.attacks_to_run
        attacked, _ = self.inner.run_standard_evaluation(x_orig, y_orig, batch_size=bs)
        return attacked

class Both:
    def __init__(self, logger):
        self.warning = lambda text: logger.log("Warning: " + text)
        self.debug = self.info = lambda text: None
'''


@pytest.mark.skipif(OFFICIAL_IS_THERE, reason="the authors' package itself is installed")
def test_the_authors_package_is_preferred_and_driven_through_its_own_interface(
    trained, run, tmp_path, monkeypatch, capsys
):
    few = correct(trained(10), 30)
    expected = make(**LITTLE).perturb(*few, Threat("linf", 0.1), run)
    folder = tmp_path / "site" / "autoattack"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(STAND_IN)
    (folder / "checks.py").write_text(
        "from pyautoattack.checks import check_zero_gradients, funcs\n"
    )
    record = tmp_path / "site" / "autoattack-0.1.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: autoattack\nVersion: 0.1\n")
    (record / "direct_url.json").write_text(
        '{"url": "https://example.org/a.git", "vcs_info": {"vcs": "git", "commit_id": "a392200"}}'
    )
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    importlib.invalidate_caches()
    attack = make(**LITTLE)
    try:
        got = attack.perturb(*few, Threat("linf", 0.1), run)
        assert attack.provenance() == {
            "package": "autoattack",
            "version": "0.1",
            "commit": "a392200",
            "engine": "fast",
        }
    finally:
        for name in ("autoattack", "autoattack.checks"):
            sys.modules.pop(name, None)
    assert torch.equal(got, expected)
    assert attack.messages == ["a flag. See flags_doc.md"]
    assert capsys.readouterr() == ("", "")


@pytest.mark.skipif(OFFICIAL_IS_THERE, reason="the authors' package would run")
@pytest.mark.parametrize("engine", ["fast", "package"])
def test_says_which_package_and_which_engine_ran(engine):
    assert make(engine=engine).provenance() == {
        "package": "pyautoattack",
        "version": importlib.metadata.version("pyautoattack"),
        "engine": engine,
    }


class TestOrder:
    @pytest.mark.parametrize("norm", NAMES)
    def test_the_ensemble_breaks_all_that_its_first_attack_breaks(self, norm, trained, run):
        network, images, labels = correct(trained(10))
        threat = Threat(norm, BUDGETS[norm])

        def survivors(**options: Any) -> Tensor:
            attacked = make(seed=0, **options).perturb(network, images, labels, threat, run)
            robust: Tensor = network(attacked).argmax(1) == labels
            return robust

        first = survivors(attacks=("apgd-ce",), iterations=20)
        both = survivors(attacks=("apgd-ce", "apgd-t"), iterations=20)
        assert (both <= first).all()
        assert both.sum() < first.sum()
        torch.manual_seed(0)
        weaker = PGD().perturb(network, images, labels, threat, run)
        assert both.sum() <= (network(weaker).argmax(1) == labels).sum()

    def test_over_confidence_does_not_hide_from_the_targeted_dlr_loss(self, trained, run):
        network, images, labels = correct(trained(10))
        loud = nn.Sequential(network, Times(1000.0))

        def survivors(model: nn.Module, name: str) -> int:
            attack = make(attacks=(name,), iterations=20, seed=0)
            attacked = attack.perturb(model, images, labels, Threat("linf", 0.1), run)
            return int((network(attacked).argmax(1) == labels).sum())

        assert survivors(loud, "apgd-t") == survivors(network, "apgd-t")
        assert survivors(loud, "apgd-ce") > survivors(network, "apgd-ce") + 10


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, logits):
        return self.factor * logits


class Noisy(nn.Module):
    def forward(self, images):
        return images + 0.05 * torch.randn_like(images)


class Quantised(nn.Module):
    def forward(self, images):
        return (8 * images).round() / 8


class Dynamic(nn.Module):
    """A defence that looks at gradients of its own while it predicts."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images):
        with torch.enable_grad():
            leaf = images.detach().requires_grad_()
            torch.autograd.grad(self.network(leaf).sum(), leaf)
        return self.network(images)


class TestFlags:
    @pytest.mark.parametrize(
        ("defence", "flag"),
        [
            (lambda network: nn.Sequential(network, nn.Softmax(1)), "probability distribution"),
            (lambda network: nn.Sequential(Noisy(), network), "randomized defense"),
            (lambda network: nn.Sequential(Quantised(), network), "zero gradient"),
            (Dynamic, "dynamic defense"),
        ],
    )
    def test_are_collected_and_not_printed(self, defence, flag, trained, run, capsys, caplog):
        network, images, labels = correct(trained(10), 20)
        attack = make(attacks=("apgd-ce", "apgd-t"), iterations=2, seed=0)
        with caplog.at_level(logging.DEBUG):
            attack.perturb(defence(network), images, labels, Threat("linf", 0.1), run)
        assert any(flag in message for message in attack.messages)
        assert len(set(attack.messages)) == len(attack.messages)
        assert capsys.readouterr() == ("", "")
        assert not caplog.records

    def test_a_plain_network_after_a_dynamic_one_raises_none(self, trained, run):
        network, images, labels = correct(trained(10), 20)
        attack = make(attacks=("apgd-ce",), iterations=2, seed=0)
        attack.perturb(Dynamic(network), images, labels, Threat("linf", 0.1), run)
        assert attack.messages
        attack.perturb(network, images, labels, Threat("linf", 0.1), run)
        assert attack.messages == []

    def test_square_breaking_more_than_the_others_is_one(self, trained, run):
        network, images, labels = correct(trained(10), 60)
        masked = nn.Sequential(Quantised(), network)
        attack = make(iterations=2, square_queries=100, seed=0)
        attack.perturb(masked, images, labels, Threat("linf", 0.2), run)
        assert any("Square Attack has decreased" in message for message in attack.messages)


@pytest.mark.parametrize("norm", NAMES)
@pytest.mark.parametrize("classes", [2, 3, 4, 7, 10])
def test_every_number_of_classes_works(classes, norm, run):
    torch.manual_seed(classes)
    network = small_network(classes).eval().requires_grad_(False)
    images = torch.rand(12, 1, 8, 8)
    labels = network(images).argmax(1)
    attack = make(**LITTLE)
    attacked = attack.perturb(network, images, labels, Threat(norm, 0.05), run)
    assert attacked.shape == images.shape
    if classes < 4:
        left = {2: "apgd-ce, fab-t, square", 3: "apgd-ce, apgd-dlr, fab-t, square"}[classes]
        assert len(attack.messages) == 1
        assert f"with {classes} classes {left} ran instead of" in attack.messages[0]
    else:
        assert attack.messages == []


@pytest.mark.parametrize(
    ("version", "classes", "left"),
    [
        ("plus", 4, ["apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"]),
        ("plus", 3, ["apgd-ce", "apgd-dlr", "fab", "square", "fab-t"]),
        ("plus", 2, ["apgd-ce", "fab", "square", "fab-t"]),
        ("rand", 3, ["apgd-ce", "apgd-dlr"]),
        ("rand", 2, ["apgd-ce"]),
    ],
)
def test_the_other_ensembles_are_fitted_as_well(version, classes, left):
    from pyautoattack import AutoAttack as Package

    package = Package(nn.Identity(), version=version)
    _fit_to_classes(package, classes, Flags())
    assert package.attacks_to_run == left
    assert package.fab.n_target_classes == classes - 1


class TestSubAttacks:
    def test_the_targets_are_all_the_other_classes(self, run):
        # A network on which only the last-ranked class is within reach: with one target fewer
        # than there are the image would survive.
        class Ranked(nn.Module):
            def forward(self, images):
                step = (images[:, 0, 0, 0] - 0.5).clamp(-0.01, 0.2)
                zero = torch.zeros_like(step)
                return torch.stack([zero + 1, zero + 0.9, zero + 0.8, zero + 0.7 + 4 * step], 1)

        images = torch.full((3, 1, 8, 8), 0.5)
        labels = torch.zeros(3, dtype=torch.long)
        for name in ("apgd-t", "fab-t"):
            attack = make(attacks=(name,), iterations=10, seed=0)
            attacked = attack.perturb(Ranked(), images, labels, Threat("linf", 0.15), run)
            assert (Ranked()(attacked).argmax(1) == 3).all(), name

    def test_too_few_classes_for_the_chosen_ones_is_not_applicable(self, run):
        network = small_network(2).eval().requires_grad_(False)
        attack = make(attacks=("apgd-t",))
        with pytest.raises(NotApplicable, match="apgd-t works with 2 classes"):
            attack.perturb(
                network,
                torch.rand(2, 1, 8, 8),
                torch.zeros(2, dtype=torch.long),
                Threat("linf", 0.1),
                run,
            )

    @pytest.mark.parametrize("iterations", [1, 7, 100])
    def test_fewer_iterations_means_what_the_constructor_means_by_it(self, iterations):
        from pyautoattack import AutoAttack as Package
        from pyautoattack.autopgd_base import APGDAttack

        package = Package(nn.Identity())
        _set_iterations(package, iterations)
        fresh = APGDAttack(nn.Identity(), n_iter=iterations, eps=0.1)
        for name in ("n_iter", "n_iter_2", "n_iter_min", "size_decr"):
            assert getattr(package.apgd, name) == getattr(fresh, name)
            assert getattr(package.apgd_targeted, name) == getattr(fresh, name)
        assert package.fab.n_iter == iterations

    def test_the_published_number_is_the_packages_own(self):
        from pyautoattack.autopgd_base import APGDAttack
        from pyautoattack.fab_pt import FABAttack_PT

        for kind in (APGDAttack, FABAttack_PT):
            assert inspect.signature(kind).parameters["n_iter"].default == PUBLISHED_ITERATIONS

    def test_the_sub_attacks_report_in_their_order(self, trained, tmp_path):
        seen: list[tuple[str, int, int]] = []
        run = make_run(tmp_path, report=lambda *given: seen.append(given))
        make(**LITTLE).perturb(*correct(trained(10)), Threat("linf", 0.02), run)
        assert list(dict.fromkeys(seen)) == [
            ("apgd-ce", 0, 4),
            ("apgd-t", 1, 4),
            ("fab-t", 2, 4),
            ("square", 3, 4),
            ("square", 4, 4),
        ]

    @pytest.mark.parametrize("options", [{"version": "best"}, {"attacks": ()}, {"seed": -1}])
    def test_impossible_options_are_refused(self, options):
        with pytest.raises(RddBenchError, match=next(iter(options))):
            make(**options)


class TestSeeds:
    def test_without_one_it_follows_the_global_generator(self, trained, run):
        few = correct(trained(10), 40)
        attack = make(attacks=("apgd-ce",), iterations=3)

        def under(seed: int) -> Tensor:
            torch.manual_seed(seed)
            attacked: Tensor = attack.perturb(*few, Threat("linf", 0.1), run)
            return attacked

        assert torch.equal(under(1), under(1))
        assert not torch.equal(under(1), under(2))

    def test_with_one_the_global_generator_neither_matters_nor_moves(self, trained, run):
        few = correct(trained(10), 40)
        attack = make(attacks=("apgd-ce",), iterations=3, seed=4)
        torch.manual_seed(1)
        before = torch.get_rng_state()
        first = attack.perturb(*few, Threat("linf", 0.1), run)
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(2)
        assert torch.equal(attack.perturb(*few, Threat("linf", 0.1), run), first)


class TestImagesAndModels:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda images: 4 * images - 2, r"range from -2 to 2; expected pixels in \[0, 1\]"),
            (lambda images: images.double(), "torch.float64"),
            (lambda images: images.flatten(1), r"shape \(10, 64\)"),
            (lambda images: images.where(images > 0, torch.nan), "range from nan"),
        ],
    )
    def test_images_that_would_be_spoilt_in_silence_are_refused(
        self, change, message, trained, run
    ):
        network, images, labels = correct(trained(10), 10)
        with pytest.raises(RddBenchError, match=message):
            make(**LITTLE).perturb(network, change(images), labels, Threat("linf", 0.1), run)

    def test_32_bit_labels_work(self, trained, run):
        network, images, labels = correct(trained(10), 10)
        threat = Threat("linf", 0.1)
        expected = make(**LITTLE).perturb(network, images, labels, threat, run)
        got = make(**LITTLE).perturb(network, images, labels.int(), threat, run)
        assert torch.equal(got, expected)

    def test_a_model_in_training_is_attacked_in_eval_mode_and_put_back(self, run):
        torch.manual_seed(0)
        network: Any = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(0.5), small_network(10))
        network.train()
        network[1].eval()
        network[2][0].weight.requires_grad_(False)
        statistics = network[0].running_mean
        before = statistics.clone()
        images = torch.rand(10, 1, 8, 8)
        labels = torch.randint(10, (10,))
        attack = make(**LITTLE)
        attack.perturb(network, images, labels, Threat("l2", 0.3), run)
        assert not any("randomized" in message for message in attack.messages)
        assert torch.equal(statistics, before)
        assert [module.training for module in network] == [True, False, True]
        flags = [parameter.requires_grad for parameter in network.parameters()]
        assert flags == [True, True, False, True, True, True, True, True]
        assert all(parameter.grad is None for parameter in network.parameters())

    @pytest.mark.parametrize("height", [1, 4, 5, 8, 12, 14, 16, 28, 29, 32, 64])
    def test_square_is_refused_in_l2_exactly_where_the_package_crashes(self, height):
        from pyautoattack.square import SquareAttack

        for width in {height, height + 1, max(1, height - 1), 2 * height}:
            images = torch.rand(1, 1, height, width)
            attack = SquareAttack(Slope(), norm="L2", n_queries=2, eps=0.1, resc_schedule=False)
            works = True
            try:
                attack.perturb(images, torch.zeros(1, dtype=torch.long))
            except (RuntimeError, ZeroDivisionError):
                works = False
            if works:
                _check_square_fits(height, width)
            else:
                with pytest.raises(NotApplicable, match=f"cannot tile {height}x{width}"):
                    _check_square_fits(height, width)

    def test_other_sub_attacks_serve_the_shapes_that_square_cannot(self, run):
        images, labels = torch.rand(2, 1, 14, 14), torch.zeros(2, dtype=torch.long)
        threat = Threat("l2", 0.1)
        with pytest.raises(NotApplicable, match="14x14"):
            make(**LITTLE).perturb(Slope(), images, labels, threat, run)
        make(attacks=("apgd-ce",), **LITTLE).perturb(Slope(), images, labels, threat, run)


class Slope(nn.Module):
    """Two classes, the first far ahead of the second, which grows with the pixels."""

    def forward(self, images):
        total = images.flatten(1).mean(1)
        return torch.stack([torch.full_like(total, 5.0), total], dim=1)
