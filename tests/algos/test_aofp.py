"""AOFP: the side path equals layers with zeroed columns, and the search is the paper's."""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import prunekit
from prunekit import Algorithm, AxisEvidence, Needs, NextChanges, Trials
from prunekit.errors import EvidenceError, ForwardError, InvalidArgumentError
from prunekit.evidence.trials import trials as trying
from prunekit.testing import randomize, scores_of, toy
from prunekit_algos.aofp import AOFP, HalvingSearch
from prunekit_algos.random import Random

T = torch.tensor([0.5, 0.01, 0.2, 0.02, 0.3, 0.03, 0.4, 0.6], dtype=torch.float64)


def search(size=8, theta=None, iterations=100, name="conv", seed=0):
    return HalvingSearch(name, size, theta, iterations, seed)


def test_worked_example():
    s = search(theta=0.05)
    assert s.granularity == 4
    s.conclude(T)  # the 4th smallest is .2
    assert set(s.space) == {1, 3, 5, 2}
    assert s.granularity == 2
    s.conclude(T)  # .02 < .05
    assert s.masked == [1, 3]
    assert s.space == [0, 2, 4, 5, 6, 7]  # and again from the start


def by_hand(means, size, theta):
    """The search as the specification tells it; ``means`` says what each half finds. Returns the masked and the stages left."""
    masked, stages = [], []
    omega = list(range(size))
    for t in means:
        granu = len(omega) // 2
        ranked = sorted(omega, key=lambda c: t[c])
        if theta is not None and t[ranked[granu - 1]] < theta:
            masked += ranked[:granu]
            omega, stages = [c for c in range(size) if c not in masked], []
            if len(omega) < 2:
                return masked, [(omega, t)]
        elif granu > 1:
            stages.append((ranked[granu:], t))
            omega = ranked[:granu]
        else:
            return masked, [*stages, (ranked, t)]
    raise AssertionError("the search does not end")


@pytest.mark.parametrize("theta", [None, 0.1, 0.4, 2.0])
@pytest.mark.parametrize("seed", range(8))
def test_search_goes_as_specified_and_masked_filters_stay_masked(seed, theta):
    generator = torch.Generator().manual_seed(seed)
    size = 5 + 3 * seed
    means = torch.rand(200, size, generator=generator, dtype=torch.float64)
    s = search(size, theta)
    for t in means:
        before = list(s.masked)
        trials = s.trials()
        if trials is None:
            break
        assert trials.base.nonzero().flatten().tolist() == sorted(before)
        drawn = trials.off & ~trials.base
        assert bool(trials.off[:, before].all())  # whatever is drawn
        assert drawn.sum(1).unique().tolist() == [len(s.space) // 2]
        assert set(drawn.any(0).nonzero().flatten().tolist()) == set(s.space)
        assert not set(s.space) & set(before)
        s.conclude(t)
        assert s.masked[: len(before)] == before
    masked, stages = by_hand(means.tolist(), size, theta)
    assert s.masked == masked
    order = [c for left, _ in reversed(stages) for c in left]
    score = s.importance()
    assert score.argsort().tolist() == [*masked, *order]
    assert AOFP(theta=theta).removes(score) == (None if theta is None else len(masked))
    least = -math.inf
    for left, t in reversed(stages):
        for c in left:
            assert float(score[c]) == pytest.approx(max(least, float(t[c])))
            least = max(least, float(t[c]))


def test_equal_means_go_by_index():
    s = search(8)
    while s.trials() is not None:
        s.update(NextChanges(torch.ones(100, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)))
    assert s.halves == 3
    assert s.importance().argsort(stable=True).tolist() == list(range(8))
    torch.testing.assert_close(s.importance(), torch.full((8,), 0.5, dtype=torch.float64))
    s = search(8, theta=0.6)
    while s.trials() is not None:
        s.conclude(torch.full((8,), 0.5, dtype=torch.float64))
    assert s.masked == list(range(7))  # one stays


def test_a_mean_is_that_over_all_draws_with_the_filter():
    damage = torch.tensor([3.0, 1.0, 4.0, 1.5, 9.0, 2.6], dtype=torch.float64)

    def t(off):
        return (off.double() @ damage).square()

    every = torch.zeros(20, 6, dtype=torch.bool)
    for row, chosen in zip(every, itertools.combinations(range(6), 3), strict=True):
        row[list(chosen)] = True
    exact = torch.stack([t(every)[every[:, c]].mean() for c in range(6)])
    s = search(6, iterations=20_000)
    s.update(NextChanges(t(s.trials().off), torch.tensor(1.0, dtype=torch.float64)))
    torch.testing.assert_close(s.means / exact, torch.ones(6, dtype=torch.float64), rtol=0, atol=0.02)


def test_draws_are_uniform_over_seeds_and_those_of_an_axis_its_own():
    draws = torch.stack([search(6, iterations=1, seed=seed).trials().off[0] for seed in range(2000)]).double()
    assert bool((draws.sum(1) == 3).all())
    assert bool(((draws.mean(0) - 0.5).abs() < 0.05).all())
    pairs = draws.T @ draws / 2000
    assert bool(((pairs[~torch.eye(6, dtype=torch.bool)] - 0.2).abs() < 0.05).all())  # 3/6 · 2/5
    first = search(12).trials().off
    assert torch.equal(first, search(12).trials().off)
    assert not torch.equal(first, search(12, name="other").trials().off)
    assert not torch.equal(first, search(12, seed=1).trials().off)


def test_the_least_harmful_filters_are_found_over_most_seeds():
    """Damages that add up, the two least ones half of the next: of 100 seeds few miss one of them."""
    damage = torch.tensor([8.0, 2.0, 9.0, 7.0, 1.0, 4.0, 6.0, 5.0, 10.0, 8.5], dtype=torch.float64)
    hits = 0
    for seed in range(100):
        s = search(10, seed=seed)
        while (trials := s.trials()) is not None:
            s.update(NextChanges(trials.off.double() @ damage, damage.sum()))
        hits += set(s.importance().argsort()[:2].tolist()) == {1, 4}
    assert hits >= 90


class Network(nn.Module):
    """Random widths; a sum, a concatenation, a layer that is told the batch's size, several consumers of one axis."""

    def __init__(self, seed):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        w, h, p, q, r, s = (int(torch.randint(4, 9, (), generator=g)) for _ in range(6))
        self.stem, self.bn = nn.Conv2d(3, w, 3, padding=1), nn.BatchNorm2d(w)
        self.a, self.bn_a, self.b = nn.Conv2d(w, h, 3, padding=1, bias=False), nn.BatchNorm2d(h), nn.Conv2d(h, w, 1)
        self.left, self.right = nn.Conv2d(w, p, 1), nn.Conv2d(w, q, 3, padding=1)
        self.mix, self.bn_mix = nn.Conv2d(p + q, r, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(r)
        self.hidden, self.head = nn.Linear(4 * r, s), nn.Linear(s, 4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.relu(self.bn(self.stem(x)))
        x = self.relu(x + self.b(self.relu(self.bn_a(self.a(x)))))
        x = torch.cat([F.relu(self.left(x)), F.gelu(self.right(x))], 1)
        x = F.max_pool2d(F.silu(self.bn_mix(self.mix(x))), 2).flatten(1)
        x = F.relu(self.hidden(x).view(len(x), 1, -1), inplace=True).flatten(1)
        return self.head(x)

    def readers(self):
        """By axis: the layers that read it, from which column on, columns a channel, and what follows the layer."""
        p = len(self.left.weight)
        out = [(self.a, 0, 1, lambda y: self.bn_a(y).relu()), (self.left, 0, 1, F.relu), (self.right, 0, 1, F.gelu)]
        return {
            "stem": out,
            "a": [(self.b, 0, 1, lambda y: y)],
            "left": [(self.mix, 0, 1, lambda y: F.silu(self.bn_mix(y)))],
            "right": [(self.mix, p, 1, lambda y: F.silu(self.bn_mix(y)))],
            "mix": [(self.hidden, 0, 4, F.relu)],
            "hidden": [(self.head, 0, 1, lambda y: y)],
        }


def network(seed):
    torch.manual_seed(seed)
    model = Network(seed)
    randomize(model, (torch.randn(8, 3, 8, 8),), seed=seed)
    return model.double().eval(), [(torch.randn(n, 3, 8, 8, dtype=torch.float64), torch.zeros(n).long()) for n in (3, 5, 1)]


@torch.no_grad()
def brute_force(model, readers, batches, off, base):
    """Zero the columns that read the channels, run layer by layer on what it reads in the real forward, compare."""
    read: dict[nn.Module, list[Tensor]] = {}
    hooks = [m.register_forward_pre_hook(lambda m, a: read.setdefault(m, []).append(a[0].clone())) for m, *_ in readers]
    for x, _ in batches:
        model(x)
    for hook in hooks:
        hook.remove()

    def outputs(gone):
        found = []
        for layer, first, width, after in readers:
            weight = layer.weight.clone()
            for c in gone.nonzero().flatten().tolist():
                weight[:, first + c * width : first + (c + 1) * width] = 0
            for x in read[layer]:
                y = (
                    F.linear(x, weight, layer.bias)
                    if isinstance(layer, nn.Linear)
                    else F.conv2d(x, weight, layer.bias, layer.stride, layer.padding)
                )
                found.append(after(y).flatten())
        return torch.cat(found)

    y = outputs(base)
    return NextChanges(torch.stack([(y - outputs(o)).square().sum() for o in off]), y.square().sum())


@dataclass
class Asking:
    """Asks for random sets twice, and remembers what came of them."""

    size: int
    answers: list[tuple[Trials, NextChanges]] = field(default_factory=list)

    def trials(self):
        if len(self.answers) == 2:
            return None
        g = torch.Generator().manual_seed(self.size + len(self.answers))
        base = torch.rand(self.size, generator=g) < 0.2 * len(self.answers)
        self.asked = Trials(base | (torch.rand(7, self.size, generator=g) < 0.5), base)
        return self.asked

    def update(self, seen):
        self.answers.append((self.asked, seen))


ANSWERS: dict[str, list[tuple[Trials, NextChanges]]] = {}


@dataclass(frozen=True)
class Curious(Algorithm):
    """Hands out all answers."""

    name = "curious"
    needs = Needs.NEXT_OUTPUTS
    collector: Callable[[int], object] = Asking

    def collect(self, axis: AxisEvidence):
        return self.collector(axis.size)

    def score(self, axis: AxisEvidence) -> Tensor:
        ANSWERS[axis.name] = axis.collected(Asking).answers
        return torch.arange(axis.size).double()


def answers(model, example, data, **options):
    ANSWERS.clear()
    plan = prunekit.plan(model, Curious(), example, data=data, **options)
    return dict(ANSWERS), plan


def assert_as_by_hand(found, model, readers, data):
    for trials, seen in found:
        expected = brute_force(model, readers, data, trials.off, trials.base)
        torch.testing.assert_close(seen.changes, expected.changes, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(seen.total, expected.total, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("at_once", [1, 500, 2**20])
@pytest.mark.parametrize("seed", range(3))
def test_the_side_path_equals_layers_with_zeroed_columns(seed, at_once, monkeypatch):
    monkeypatch.setattr(trying, "AT_ONCE", at_once)
    model, data = network(seed)
    found, _ = answers(model, data[0][0][:1], data)
    assert found.keys() == model.readers().keys()
    for axis, readers in model.readers().items():
        assert len(found[axis]) == 2
        assert_as_by_hand(found[axis], model, readers, data)


@pytest.mark.parametrize("theta", [None, 0.2])
def test_scores_equal_a_search_by_brute_force(theta):
    model, data = network(5)
    plan = {}

    class Noting(AOFP):
        def score(self, axis):
            plan[axis.name] = super().score(axis)
            return plan[axis.name]

    made = prunekit.plan(model, Noting(theta=theta, iters_per_half=40), data[0][0][:1], data=data, seed=3)
    for axis, readers in model.readers().items():
        s = search(len(plan[axis]), theta, 40, axis, seed=3)
        while (trials := s.trials()) is not None:
            s.update(brute_force(model, readers, data, trials.off, trials.base))
        torch.testing.assert_close(plan[axis], s.importance(), rtol=1e-9, atol=1e-12)
        if theta is not None:
            assert len(made.keep.get(axis, plan[axis])) == len(plan[axis]) - len(s.masked)
    assert theta is None or made.keep


class Gated(nn.Module):
    """A gated linear unit, and writing in place over what was read, through views as well."""

    def __init__(self):
        super().__init__()
        self.up, self.two, self.back = nn.Linear(5, 8), nn.Linear(8, 12), nn.Linear(6, 8)
        self.more, self.head = nn.Linear(8, 7), nn.Linear(7, 3)

    def forward(self, x):
        x = self.up(x).relu()
        a, b = self.two(x).chunk(2, 1)
        y = self.back(a * b.sigmoid())
        x.zero_()
        x += torch.relu(y)
        z = self.more(x)
        x.mul_(3)
        z.view(-1).mul_(2)
        F.relu(z, inplace=True)
        z[:, 0] = 1
        return self.head(z)


def test_gates_and_writing_in_place_confuse_nothing():
    torch.manual_seed(0)
    model, data = Gated().double(), [(torch.randn(n, 5, dtype=torch.float64), None) for n in (4, 2)]
    randomize(model, (data[0][0],))

    def glu(y):
        return y[:, :6] * y[:, 6:].sigmoid()

    def more(y):
        y = (2 * y).relu()
        y[:, 0] = 1
        return y

    found, _ = answers(model, data[0][0][:1], [x for x, _ in data], axes="*", ignore=["two*", "more", "head"])
    assert_as_by_hand(found["up"], model, [(model.two, 0, 1, glu), (model.more, 0, 1, more)], data)


class Normed(nn.Module):
    """A norm written out."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(5, 8), nn.Linear(8, 6)
        self.scale, self.head = nn.Parameter(torch.rand(6)), nn.Linear(6, 3)

    def norm(self, x):
        return F.silu(x * (x.pow(2).mean(-1, keepdim=True) + 1e-3).rsqrt() * self.scale)

    def forward(self, x):
        return self.head(self.norm(self.down(self.up(x).relu())))


def test_pools_before_the_activation_and_norms_written_out_belong_to_the_layer():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3, padding=1), nn.AvgPool2d(2), nn.ReLU(), nn.Conv2d(5, 2, 1)
    model, data = nn.Sequential(*layers).double(), [torch.randn(n, 3, 8, 8, dtype=torch.float64) for n in (4, 2)]
    found, _ = answers(model, data[0][:1], data)
    assert_as_by_hand(found["0"], model, [(model[2], 0, 1, nn.Sequential(*layers[3:5]))], [(x, None) for x in data])
    model, data = Normed().double(), [torch.randn(n, 5, dtype=torch.float64) for n in (4, 2)]
    found, _ = answers(model, data[0][:1], data)
    assert_as_by_hand(found["up"], model, [(model.down, 0, 1, model.norm)], [(x, None) for x in data])


def test_attention_is_a_layer_of_its_own():
    t = toy("attention")
    m = t.model
    found, _ = answers(m, t.example, t.data, axes="all", ignore="conv_groups")
    cut = [(m.qkv, 0, 1, lambda y: y), (m.up, 0, 1, F.relu), (m.head, 0, 1, lambda y: y)]
    assert_as_by_hand(found["embed"], m, cut, t.data)
    assert_as_by_hand(found["up"], m, [(m.down, 0, 1, lambda y: y)], t.data)
    assert_as_by_hand(found["qkv:heads"], m, [(m.proj, 0, 4, lambda y: y)], t.data)


def test_dead_filters_are_what_a_small_theta_masks():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 10, 3), nn.ReLU(), nn.Conv2d(10, 6, 3)).double(), torch.randn(4, 3, 8, 8).double()
    dead = (2, 5, 6)
    with torch.no_grad():
        model[0].weight[list(dead)], model[0].bias[list(dead)] = 0, -1
    plan = prunekit.plan(model, AOFP(theta=1e-6), x[:1], data=[x])
    assert plan.keep == {"0": tuple(c for c in range(10) if c not in dead)}


def trained():
    """A small CNN that tells blobs in one of four corners, and data that it has not seen."""
    g = torch.Generator().manual_seed(0)

    def draw(n):
        y = torch.randint(0, 4, (n,), generator=g)
        x = torch.randn(n, 1, 8, 8, generator=g)
        for i, corner in enumerate(y.tolist()):
            x[i, 0, 4 * (corner // 2) :, 4 * (corner % 2) :][:4, :4] += 0.8
        return x, y

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            *(nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU()),
            *(nn.Conv2d(12, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(256, 24), nn.ReLU(), nn.Linear(24, 4)),
        )
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(80):
            x, y = draw(64)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval(), [draw(32), draw(32)]


@torch.no_grad()
def loss(model, data):
    return float(torch.stack([F.cross_entropy(model(x), y) for x, y in data]).mean())


def test_a_trained_network_loses_less_than_by_chance():
    model, data = trained()
    dense = loss(model, data)
    assert dense < 0.5
    small = prunekit.prune(model, "aofp", data[0][0][:1], ratio=0.5, data=data)
    chance = [loss(prunekit.prune(model, Random(), data[0][0][:1], ratio=0.5, seed=s), data) for s in range(8)]
    assert loss(small, data) < min(chance)
    assert loss(model, data) == dense
    automatic = prunekit.prune(model, AOFP(theta=0.01), data[0][0][:1], data=data)
    widths = [p.shape[0] for n, p in automatic.named_parameters() if n.endswith("weight") and p.ndim > 1]
    assert widths[-1] == 4
    assert sum(widths) < 12 + 16 + 24 + 4
    assert loss(automatic, data) < sum(chance) / len(chance)


def test_a_vision_transformer():
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(32, 8, 2, 4, 32, 48, num_classes=5)
    x = torch.randn(1, 3, 32, 32)
    randomize(model, (torch.randn(4, 3, 32, 32),))
    small = prunekit.prune(model.eval(), AOFP(iters_per_half=20), x, ratio=0.5, data=[torch.randn(3, 3, 32, 32)])
    kept = {name: len(indices) for name, indices in prunekit.plan_of(small).keep.items()}
    assert sorted(kept.values()) == [2, 2, 24, 24]  # heads and hidden features of two layers


class Counted(list):
    """A list that counts how often it is gone over, and lets nobody keep its batches."""

    passes = 0
    born: tuple[weakref.ref, ...] = ()

    def __iter__(self):
        self.passes += 1
        for batch in super().__iter__():
            fresh = batch.clone()
            self.born = (*self.born, weakref.ref(fresh))
            yield fresh
            del fresh
            assert sum(r() is not None for r in self.born) <= 2


def test_the_data_is_gone_over_once_a_half_and_not_kept():
    t = toy("plain")  # axes of 6, 8 and 10 channels
    data = Counted([x for x, _ in t.data] * 5)
    prunekit.plan(t.model, AOFP(), t.example, data=data)
    assert data.passes == 3


def test_data_that_can_be_used_once_only_is_an_error():
    t = toy("plain")
    with pytest.raises(InvalidArgumentError, match="is read more often: by aofp more than once; pass a list"):
        prunekit.plan(t.model, AOFP(), t.example, data=iter([x for x, _ in t.data]))


def test_too_few_iterations_and_silent_layers_are_named():
    t = toy("plain")
    with pytest.raises(EvidenceError, match=r"1 iterations never drew \d of the \d+ filters of \w+; raise AOFP"):
        prunekit.plan(t.model, AOFP(iters_per_half=1), t.example, data=t.data)
    with torch.no_grad():
        t.model.conv2.bias.fill_(-1e6)  # behind its ReLU nothing is left
    plan = prunekit.plan(t.model, AOFP(), t.example, data=t.data)
    assert "puts out nothing that a change could be measured by" in plan.dropped["conv1"]
    assert "fc" in plan.keep


@pytest.mark.parametrize("what", ["layer", "norm"])
def test_data_that_leads_another_way_is_an_error(what):
    class Fickle(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.norm, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

        def forward(self, x):
            x = self.a(x).relu()
            if len(x) > 3 and what == "layer":
                return self.c(x)
            x = self.b(x)
            return self.c((x if len(x) > 3 else self.norm(x)).relu())

    torch.manual_seed(0)
    with pytest.raises(ForwardError, match=r"leaves out .* pass example_inputs that are like the data"):
        prunekit.plan(Fickle().eval(), AOFP(), torch.randn(1, 4), data=[torch.randn(2, 4), torch.randn(5, 4)])


def test_a_collector_without_trials_is_an_error():
    class Deaf:
        def __init__(self, size):
            pass

        def update(self, seen):
            pass

    t = toy("plain")
    with pytest.raises(InvalidArgumentError, match=r"Curious needs next_outputs, .* a Searcher, with a method trials"):
        prunekit.plan(t.model, Curious(collector=Deaf), t.example, data=t.data)


def test_scores_follow_the_seed_alone():
    t = toy("residual")
    first, again, other = (scores_of(AOFP(), t, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert any(not torch.equal(first[n], other[n]) for n in first)


@pytest.mark.parametrize(
    "options", [{"theta": 0}, {"theta": True}, {"theta": math.nan}, {"iters_per_half": 0}, {"iters_per_half": 1.5}]
)
def test_options_are_checked(options):
    with pytest.raises(InvalidArgumentError, match=rf"AOFP\({next(iter(options))}="):
        AOFP(**options)
