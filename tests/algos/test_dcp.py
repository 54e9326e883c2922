"""DCP: greedy selection equals the slow way by autograd on whole models, and what is kept between passes changes nothing."""

import copy
from contextlib import ExitStack, contextmanager
from itertools import pairwise

import pytest
import torch
from torch import autograd, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import prunekit
from prunekit import Algorithm, ConsumerGradients, Needs
from prunekit.errors import EvidenceError, InvalidArgumentError
from prunekit.evidence.reconstruction import reconstruct as reconstructing
from prunekit.testing import randomize, scores_of, toy
from prunekit_algos.dcp import DCP

X = torch.tensor([[1, 0, 2], [0, 1, 1]], dtype=torch.float64)
W = torch.tensor([[1, 2, 0.5], [0, -1, 1]], dtype=torch.float64)
G = torch.tensor([[-0.5, -0.625, -1.625], [-0.5, 0, -1]], dtype=torch.float64)


def visit(model, x, data, axis, use, loss=None, **options):
    """What ``use`` finds out from the reconstruction of one axis."""
    found = []

    class Visitor(Algorithm):
        name = "visitor"
        needs = Needs.CONSUMER_GRADIENTS

        def score(self, evidence):
            with evidence.reconstruction(**options) as network:
                found.append(use(network))
            return torch.arange(evidence.size, dtype=torch.float64)

    prunekit.plan(model, Visitor(), x, data=data, loss=loss, axes=[axis], ratio=0)
    return found[0]


@contextmanager
def outputs_of(model, modules):
    """The outputs of these modules, in the order of their calls."""
    seen = []
    with ExitStack() as hooks:
        for name in modules:
            hook = model.get_submodule(name).register_forward_hook(lambda m, args, out: seen.append(out.clone()))
            hooks.callback(hook.remove)
        yield seen


class Slow:
    """One axis of a model in float64, by whole forwards and autograd."""

    def __init__(self, model, name, x, y, *, balance=1.0, loss=F.cross_entropy):
        self.model, self.x, self.y, self.balance, self.loss = copy.deepcopy(model).eval(), x, y, balance, loss
        info = prunekit.analyze(model, x[:1]).axes[name]
        self.size = info.size
        self.names = [m.tensor for m in info.members if m.role == "consumer"]
        self.modules = [n.rpartition(".")[0] for n in self.names]
        self.biases = [f"{m}.bias" for m in self.modules if self.model.get_submodule(m).bias is not None]
        with outputs_of(self.model, self.modules) as self.targets, torch.no_grad():
            self.model(x)

    def split(self, weight):
        """``[outputs, channels * k', *kernel] -> [channels, outputs, k]``."""
        return weight.unflatten(1, (self.size, -1)).movedim(1, 0).flatten(2)

    def measure(self, parameters, rows=slice(None)):
        """The loss, and its gradients by the consumers' weights and biases, whole."""
        leaves = {n: p.detach().clone().requires_grad_() for n, p in parameters.items()}
        with outputs_of(self.model, self.modules) as seen:
            out = torch.func.functional_call(self.model, leaves, (self.x[rows],))
        loss = sum(0.5 * (a - b[rows]).square().mean() for a, b in zip(seen, self.targets, strict=True))
        if self.balance:
            loss = loss + self.balance * self.loss(out, self.y[rows])
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        return float(loss.detach()), dict(zip(leaves, grads, strict=True))

    def select(self, *, form="paper", at_once=1, lr=0.01, batch_size=None, epsilon=None):
        """The picks in their order, and the loss after each."""
        whole = {n: p.detach().clone() for n, p in self.model.named_parameters() if n in (*self.names, *self.biases)}
        now = {n: torch.zeros_like(p) if n in self.names else p.clone() for n, p in whole.items()}
        picks, losses = [], []
        while True:
            loss, grads = self.measure(now)
            losses.append(loss)
            if len(picks) == self.size or (
                epsilon is not None and len(losses) > 1 and abs(losses[-2] - loss) / losses[0] <= epsilon
            ):
                return picks, losses
            score = torch.zeros(self.size, dtype=torch.float64)
            for j in range(self.size):
                for n in self.names:
                    g = self.split(grads[n])[j]  # [outputs, k]
                    score[j] += g.square().sum().sqrt() if form == "paper" else sum(row.square().sum().sqrt() for row in g)
            score[picks] = -1
            turn = [j for j in score.argsort(descending=True).tolist()[:at_once] if score[j] > 0]
            if not turn:
                return picks, losses
            picks += turn
            for j in turn:
                for n in self.names:
                    self.split(now[n])[j] = self.split(whole[n])[j]  # a view
            self.train(now, picks, lr, batch_size or len(self.x))

    def train(self, now, picks, lr, batch_size):
        variables = {n: nn.Parameter(p) for n, p in now.items()}
        optimizer = torch.optim.SGD(variables.values(), lr=lr, momentum=0.9, nesterov=True, weight_decay=1e-4)
        for start in range(0, len(self.x), batch_size):
            _, grads = self.measure(variables, slice(start, start + batch_size))
            for n, v in variables.items():
                v.grad = grads[n].clone()
                if n in self.names:
                    self.split(v.grad)[[j for j in range(self.size) if j not in picks]] = 0
            optimizer.step()


def order_of(score):
    """The picks, first to last."""
    return score.argsort(descending=True).tolist()[: int((score >= 1).sum())]


def joined(t):
    return tuple(torch.cat(parts) for parts in zip(*t.data, strict=True))


class Regression:
    """One linear consumer of rows ``x`` [samples, channels] with weights [outputs, channels], by the formula."""

    def __init__(self, x, w):
        self.x, self.y, self.weights, self.biases = x, x @ w.T, (w.T[:, :, None].clone(),), ()

    def gradients(self, weights, biases):
        error = self.x @ weights[0][:, :, 0] - self.y
        return ConsumerGradients(float(error.square().mean() / 2), ((self.x.T @ error / error.numel())[:, :, None],), ())

    def steps(self, weights, biases):
        yield self.gradients(weights, biases)


def worked_example():
    """A model whose second layer reads ``X`` with weights ``W``."""
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 2, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(3))
        model[1].weight.copy_(W)
    return model


def test_worked_example():
    found = visit(worked_example(), X, [X], "0", lambda n: n.gradients([torch.zeros(3, 2, 1).double()], []), balance=0)
    assert found.weights[0].squeeze(2).T.tolist() == G.tolist()
    gradients = [G.T[:, :, None]]
    assert DCP().missed(gradients).tolist() == pytest.approx([0.707107, 0.625, 1.908042], abs=1e-6)
    assert DCP(form="code").missed(gradients).tolist() == [1, 0.625, 2.625]
    for form in ("paper", "code"):
        assert order_of(DCP(form=form).select(Regression(X, W)))[0] == 2
        assert order_of(DCP(form=form, balance=0).select(Regression(X, W)))[0] == 2


def test_worked_example_in_which_the_forms_differ():
    gradients = [torch.tensor([[1, 0], [0.7, 0.7]], dtype=torch.float64)[:, :, None]]
    paper, code = DCP().missed(gradients), DCP(form="code").missed(gradients)
    assert paper.tolist() == pytest.approx([1, 0.98995], abs=1e-5)
    assert int(paper.argmax()) == 0
    assert code.tolist() == pytest.approx([1, 1.4])
    assert int(code.argmax()) == 1


def test_the_reconstruction_loss_has_its_half():
    zeros = [torch.zeros(3, 2, 1).double()]
    loss = visit(worked_example(), X, [X], "0", lambda n: n.gradients(zeros, []).loss, balance=0)
    assert loss == float((X @ W.T).square().mean() / 2) == 1.78125


@pytest.mark.parametrize(("size", "eta", "kept"), [(10, 0.3, 7), (10, 0.9, 1), (100, 0.29, 71), (8, 0.3, 6), (8, 0.0, 8)])
def test_eta_keeps_c_less_the_floor_of_eta_c(size, eta, kept):
    x = torch.randn(40, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    w = torch.randn(5, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    algorithm = DCP(eta=eta)
    score = algorithm.select(Regression(x, w))
    assert len(order_of(score)) == kept == size - algorithm.removes(score)
    assert DCP().removes(score) is None


def test_eta_overrides_the_ratio_and_picks_the_same_channels():
    t = toy("plain")
    by_eta = prunekit.plan(t.model, DCP(eta=0.5), t.example, data=t.data, ratio=0.1)
    by_ratio = prunekit.plan(t.model, DCP(), t.example, data=t.data, ratio=0.5)
    assert by_eta.keep == by_ratio.keep
    assert {len(by_eta.keep[a]) for a in ("conv1", "conv2", "fc")} == {3, 4, 5}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["plain", "residual", "batch_norm"])
@pytest.mark.parametrize(
    ("options", "slow"),
    [
        ({"balance": 0}, {}),
        ({"balance": 0, "form": "code", "channels_per_step": 2}, {"form": "code", "at_once": 2}),
        ({"balance": 0.7, "lr": 0.05, "batch_size": 3}, {"lr": 0.05, "batch_size": 3}),
    ],
    ids=["reconstruction", "code", "loss"],
)
def test_selection_equals_brute_force(name, seed, options, slow):
    t = toy(name, seed)
    x, y = joined(t)
    scores = scores_of(DCP(**{"channels_per_step": 1, **options}), t)
    assert scores
    for axis, score in scores.items():
        picks, _ = Slow(t.model, axis, x, y, balance=options["balance"]).select(**slow)
        assert order_of(score) == picks
        assert score[picks].tolist() == list(range(len(score), len(score) - len(picks), -1))
        assert bool((score[score < 1] <= 0.5).all())


class Tricky(nn.Module):
    """In front of and behind what reads `mid`: views, changes in place, numbers taken from tensors, and rows iterated over."""

    def __init__(self):
        super().__init__()
        self.stem, self.side = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 4, 1, bias=False)
        self.mid, self.out = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
        self.fc, self.head = nn.Linear(8 * 4 + 4, 10), nn.Linear(10, 4)

    def forward(self, x):
        a = self.stem(x)
        torch.relu_(a)
        side = torch.stack(list(self.side(x))).mean((2, 3))
        side.mul_(float(side.abs().max() > 0))
        left, right = a.chunk(2, 1)
        b = F.relu(self.mid(torch.cat([left, right], 1)), inplace=True)
        a += self.out(b)
        a.relu_()
        pooled = F.adaptive_avg_pool2d(a, 2).flatten(1)
        return self.head(F.relu(self.fc(torch.cat([pooled, side], 1))))


def tricky():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 3, 8, 8, generator=generator, dtype=torch.float64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = randomize(Tricky().double(), (x,)).eval()
    return model, x, torch.randint(0, 4, (6,), generator=generator)


@pytest.mark.parametrize("cache", [2**30, 0], ids=["kept", "run again"])
@pytest.mark.parametrize("axis", ["mid", "fc"])
def test_gradients_equal_those_of_whole_forwards(axis, cache, monkeypatch):
    monkeypatch.setattr(reconstructing, "CACHE", cache)
    model, x, y = tricky()
    slow = Slow(model, axis, x, y, balance=2.0)
    generator = torch.Generator().manual_seed(1)
    parameters = {n: p for n, p in model.named_parameters() if n in (*slow.names, *slow.biases)}
    drawn = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in parameters.items()}
    loss, grads = slow.measure(drawn)

    def use(network):
        before = [network.weights, network.biases]
        weights, biases = [slow.split(drawn[n]) for n in slow.names], [drawn[n] for n in slow.biases]
        network.gradients([w + 1 for w in weights], biases)  # leaves no trace
        return before, network.gradients(weights, biases)

    (weights, biases), found = visit(model, x, [(x[:4], y[:4]), (x[4:], y[4:])], axis, use, balance=2.0)
    for n, w, g in zip(slow.names, weights, found.weights, strict=True):
        assert torch.equal(w, slow.split(parameters[n].detach()))
        torch.testing.assert_close(g, slow.split(grads[n]), rtol=1e-9, atol=1e-12)
    for n, b, g in zip(slow.biases, biases, found.biases, strict=True):
        assert torch.equal(b, parameters[n].detach())
        torch.testing.assert_close(g, grads[n], rtol=1e-9, atol=1e-12)
    assert found.loss == pytest.approx(loss, rel=1e-12)


class Shared(nn.Module):
    """One convolution reads one part of the channels after the other, each taken from an iterator over the parts."""

    def __init__(self):
        super().__init__()
        self.stem, self.share, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(4, 6, 3), nn.Linear(6, 4)

    def forward(self, x):
        a = F.relu(self.stem(x)).unflatten(1, (2, 4)).transpose(0, 1)
        return self.head(sum(F.relu(self.share(part)) for part in a).mean((2, 3)))


@pytest.mark.parametrize("balance", [0, 1])
def test_a_parameter_that_is_read_in_several_calls_has_one_gradient(balance):
    _, x, y = tricky()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Shared().double()
    slow = Slow(model, "stem#2", x, y, balance=balance)
    parameters = {n: p * 0.5 for n, p in model.named_parameters() if n in (*slow.names, *slow.biases)}
    loss, grads = slow.measure(parameters)
    given = [slow.split(parameters["share.weight"].detach())], [parameters["share.bias"].detach()]
    found = visit(model, x, [(x, y)], "stem#2", lambda n: n.gradients(*given), balance=balance)
    assert len(slow.targets) == 2
    assert found.loss == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(found.weights[0], slow.split(grads["share.weight"]), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.biases[0], grads["share.bias"], rtol=1e-9, atol=1e-12)


class Counter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.convolutions = self.linears = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.convolutions += func.overloadpacket is torch.ops.aten.convolution
        self.linears += func.overloadpacket is torch.ops.aten.addmm
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(
    ("axis", "balance", "convolutions", "linears"),
    [("fc", 1, 0, 1), ("mid", 1, 1, 2), ("mid", 0, 1, 0), ("stem", 1, 2, 2), ("stem", 0, 2, 1)],
)
def test_a_pass_makes_again_what_lies_between_the_consumers_and_the_last_thing_asked_for(axis, balance, convolutions, linears):
    model, x, y = tricky()

    def use(network):
        with Counter() as counter:
            network.gradients(network.weights, network.biases)
        return counter.convolutions, counter.linears

    assert visit(model, x, [(x, y)], axis, use, balance=balance) == (convolutions, linears)


def test_only_what_is_read_again_is_kept(monkeypatch):
    sizes = []
    size = reconstructing._Piece.size
    monkeypatch.setattr(reconstructing._Piece, "size", property(lambda p: sizes.append(size.fget(p)) or sizes[-1]))
    model = nn.Sequential(
        *(layer for _ in range(4) for layer in (nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4),
    ).eval()  # fmt: skip
    x, y = torch.randn(4, 16, 16, 16), torch.zeros(4, dtype=torch.long)
    visit(model, x, [(x, y)], "14", lambda n: n.gradients(n.weights, n.biases))
    read, made = 4 * 8 * 4, 4 * 4 * 4  # bytes of what the last layer reads, and of what it puts out
    assert read + made <= sizes[0] <= read + made + 4 * 8 * 4 + 64
    assert sizes[0] < x.numel() * 4 / 100


@pytest.mark.parametrize("epsilon", [0.5, 0.1, 0.02, 0.0])
@pytest.mark.parametrize("name", ["plain", "residual"])
def test_adapt_stops_when_the_loss_hardly_changes(name, epsilon):
    t = toy(name)
    x, y = joined(t)
    algorithm = DCP(adapt=epsilon, channels_per_step=1)
    scores = scores_of(algorithm, t)
    plan = prunekit.plan(t.model, algorithm, t.example, data=t.data, ratio=0.9)
    stopped = 0
    for axis, score in scores.items():
        picks, losses = Slow(t.model, axis, x, y).select(epsilon=epsilon)
        assert order_of(score) == picks
        assert algorithm.removes(score) == len(score) - len(picks)
        assert len(plan.keep.get(axis, score)) == len(picks)
        stopped += len(picks) < len(score)
        assert all(abs(a - b) / losses[0] > epsilon for a, b in pairwise(losses[:-1]))
    if epsilon == 0.5:
        assert stopped == len(scores)


def test_the_rest_stands_by_its_last_gradients():
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 9, generator=generator, dtype=torch.float64) for n in (40, 5))
    algorithm = DCP(eta=0.5, lr=0)
    score = algorithm.select(Regression(x, w))
    picks = order_of(score)
    assert len(picks) == 5
    weights = torch.zeros(9, 5, 1, dtype=torch.float64)
    weights[picks[:-1]] = w.T[picks[:-1], :, None]
    missed = algorithm.missed(Regression(x, w).gradients([weights], []).weights)
    rest = [j for j in missed.argsort(descending=True).tolist() if j not in picks]
    assert score.argsort(descending=True).tolist() == picks + rest


def test_channels_that_nothing_depends_on_are_never_picked():
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (40, 5))
    x[:, [1, 4]] = 0
    score = DCP().select(Regression(x, w))
    assert sorted(order_of(score)) == [0, 2, 3, 5]
    assert score[[1, 4]].tolist() == [0, 0]


def newton(features, classes, decay=1e-3):
    """The softmax regression with the least loss, by Newton's method: mean cross entropy of each sample at the optimum."""
    kinds, width = int(classes.max()) + 1, features.shape[1]
    theta = torch.zeros(kinds * (width + 1), dtype=torch.float64)

    def parts(theta):
        table = theta.view(kinds, width + 1)
        return table[:, :width], table[:, width]

    def loss(theta):
        weight, bias = parts(theta)
        return F.cross_entropy(features @ weight.T + bias, classes) + decay / 2 * weight.square().sum()

    for _ in range(60):
        g, h = autograd.functional.jacobian(loss, theta), autograd.functional.hessian(loss, theta)
        step = torch.linalg.solve(h + 1e-9 * torch.eye(len(theta)), g)
        scale = 1.0
        while loss(theta - scale * step) > loss(theta) and scale > 1e-6:
            scale /= 2
        theta = theta - scale * step
    return parts(theta)


def test_heads_stand_for_the_loss_of_what_is_in_front_of_them():
    t = toy("plain")
    x, y = joined(t)
    m = t.model
    with torch.no_grad():
        maps = m.conv2(m.conv1(x).relu()).relu()
    mean, var = maps.mean((0, 2, 3), keepdim=True), maps.var((0, 2, 3), keepdim=True, correction=0)

    def features(maps):
        return ((maps - mean) / (var + 1e-5).sqrt()).relu().mean((2, 3))

    weight, bias = newton(features(maps), y)

    def head_loss(model_output, targets):  # of the model that ends at the head
        return F.cross_entropy(features(model_output) @ weight.T + bias, targets)

    full = float(head_loss(maps, y))
    assert full < 0.5 * float(F.cross_entropy(torch.zeros(len(y), 4).double(), y))  # it has learned

    def both(network):
        zeros = [torch.zeros_like(w) for w in network.weights]
        return network.gradients(network.weights, network.biases).loss, network.gradients(zeros, network.biases)

    # One head stands in the middle of the three activations, which is that of conv2.
    kept, found = visit(m, t.example, t.data, "conv1", both, heads=1)
    assert kept == pytest.approx(full, rel=1e-3)
    off = m.conv2.bias.detach()[None, :, None, None].expand_as(maps)
    leaf = torch.zeros_like(m.conv2.weight, requires_grad=True)
    with torch.no_grad():
        read, target = m.conv1(x).relu(), m.conv2(m.conv1(x).relu())
    out = F.conv2d(read, leaf, m.conv2.bias, stride=2, padding=1)
    loss = 0.5 * (out - target).square().mean() + head_loss(out.relu(), y)
    (grad,) = torch.autograd.grad(loss, leaf)
    assert torch.equal(out.detach(), off)
    assert found.loss == pytest.approx(float(loss.detach()), rel=1e-3)
    torch.testing.assert_close(found.weights[0], grad.movedim(1, 0).flatten(2), rtol=1e-2, atol=1e-4)
    with torch.no_grad():
        final = float(F.cross_entropy(m(x), y))
    for axis in ("conv2", "fc"):  # no head behind them, but the network's own
        assert visit(m, t.example, t.data, axis, both, heads=1)[0] == pytest.approx(final, rel=1e-9)


def test_heads_are_not_for_everything():
    t = toy("plain")
    with pytest.raises(EvidenceError, match=r"has 3 activation\(s\) .* fewer than heads=4"):
        prunekit.plan(t.model, DCP(heads=4), t.example, data=t.data)
    values = [(x, torch.zeros(len(x), 4).double()) for x, _ in t.data]
    with pytest.raises(EvidenceError, match="heads=0"):
        prunekit.plan(t.model, DCP(heads=1), t.example, data=values, loss=F.mse_loss)


@pytest.mark.parametrize("algorithm", [DCP(), DCP(heads=2, batch_size=2)], ids=repr)
def test_model_is_untouched_and_the_plan_is_always_the_same(algorithm, snapshot):
    t = toy("depthwise")
    before = snapshot(t.model)
    first = prunekit.plan(t.model, algorithm, t.example, data=t.data).keep
    assert snapshot(t.model) == before
    torch.manual_seed(1)
    assert prunekit.plan(t.model, algorithm, t.example, data=t.data).keep == first
    singly = [(x[i : i + 1], y[i : i + 1]) for x, y in t.data for i in range(len(x))]
    assert prunekit.plan(t.model, algorithm, t.example, data=singly).keep == first


def test_what_does_not_fit_the_cache_is_run_again(monkeypatch):
    t = toy("residual")
    algorithm = DCP(heads=1, batch_size=2)
    kept = scores_of(algorithm, t)
    monkeypatch.setattr(reconstructing, "CACHE", 0)
    again = scores_of(algorithm, t)
    assert all(torch.equal(again[name], score) for name, score in kept.items())


def test_data_must_be_there_more_than_once():
    t = toy("plain")
    with pytest.raises(InvalidArgumentError, match=r"can be read once, .*by dcp more than once; pass a list or a DataLoader"):
        prunekit.plan(t.model, "dcp", t.example, data=iter(t.data))


def test_targets_are_needed_for_the_loss_only():
    t = toy("plain")
    inputs = [x for x, _ in t.data]
    with pytest.raises(InvalidArgumentError, match="targets"):
        prunekit.plan(t.model, "dcp", t.example, data=inputs)
    assert prunekit.plan(t.model, DCP(balance=0), t.example, data=inputs).keep


def test_consumers_that_are_no_matrix_product_are_named():
    t = toy("grouped")
    plan = prunekit.plan(t.model, "dcp", t.example, data=t.data)
    assert "grouped.weight is read by conv2d with conv_groups" in plan.dropped["stem"]
    with pytest.raises(EvidenceError, match="not a plain matrix product"):
        prunekit.plan(t.model, "dcp", t.example, data=t.data, axes=["stem"])


def test_samples_that_cannot_be_told_apart():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    x, pairs = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([[0, 1], [1, 2]])

    def loss(output, targets):
        return (output[targets[:, 0]] - output[targets[:, 1]]).square().mean()

    with pytest.raises(EvidenceError, match=r"4 samples .* cannot be cut into mini-batches of 2; use batch_size=None"):
        prunekit.plan(model, DCP(batch_size=2), x, data=[(x, pairs)], loss=loss)
    assert prunekit.plan(model, DCP(batch_size=None), x, data=[(x, pairs)], loss=loss).keep
    assert prunekit.plan(model, DCP(batch_size=4), x, data=[(x, pairs)], loss=loss).keep  # nothing to cut


def test_some_channels_of_a_reconstruction_are_those_of_the_layer_without_the_others():
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (40, 5))
    kept = torch.tensor([0, 2, 3, 7])
    w[:, [1, 4, 5, 6]] = 0
    some = reconstructing.ReconstructionOfSome(Regression(x, w), kept)
    assert torch.equal(DCP(lr=0.1).select(some), DCP(lr=0.1).select(Regression(x[:, kept], w[:, kept])))


class Vision(nn.Module):
    """A small ViT of torch's own encoder layers."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(1, 16, 4, stride=4)
        layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0, activation="gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.encoder(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


def convolutional():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 4),
    )  # fmt: skip


def trained(kind, seed=0):
    """A model that tells in which quarter of a noisy image a blob lies, with its data in batches."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        x, y = torch.randn(96, 1, 16, 16), torch.randint(0, 4, (96,))
        for image, quarter in zip(x, y.tolist(), strict=True):
            row, column = divmod(quarter, 2)
            image[0, 8 * row + 2 : 8 * row + 6, 8 * column + 2 : 8 * column + 6] += 2
        model = kind()
        optimizer = torch.optim.Adam(model.parameters(), 5e-3)
        for _ in range(40):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval(), x, y


@pytest.mark.parametrize("kind", [convolutional, Vision])
def test_prunes_a_trained_network_better_than_chance(kind):
    model, x, y = trained(kind)
    batches = list(zip(x.split(32), y.split(32), strict=True))

    def loss_without(algorithm, **options):
        small = prunekit.prune(model, algorithm, x[:1], ratio=0.5, data=batches, **options)
        plan = prunekit.plan_of(small)
        with torch.no_grad():
            return float(F.cross_entropy(small(x), y)), plan

    found, plan = loss_without("dcp")
    chance = [loss_without("random", seed=seed)[0] for seed in range(5)]
    assert found < sum(chance) / len(chance)
    if kind is Vision:
        assert {plan.axes[name].kind for name in plan.keep} == {"hidden", "heads"}
        assert not plan.dropped


@pytest.mark.parametrize(
    "options",
    [
        {"form": "neurips"}, {"balance": -1.0}, {"balance": float("nan")}, {"eta": 1.0}, {"adapt": -0.1},
        {"eta": 0.5, "adapt": 0.1}, {"channels_per_step": 0}, {"channels_per_step": 1.5}, {"channels_per_step": True},
        {"heads": -1}, {"heads": 1, "balance": 0.0}, {"lr": -1.0}, {"batch_size": 0},
    ],
)  # fmt: skip
def test_options_are_checked(options):
    with pytest.raises(InvalidArgumentError, match=r"DCP\("):
        DCP(**options)
