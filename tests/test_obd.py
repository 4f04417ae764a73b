"""Optimal Brain Damage against the exact Hessian: what is exact is exact, what is an estimate converges."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from hpcdl.compress.prune import obd
from hpcdl.errors import HpcdlError

torch = pytest.importorskip("torch")
nn = torch.nn
pytestmark = pytest.mark.torch


def network(*sizes: int, function: Any = None, last: Any = None) -> Any:
    torch.manual_seed(3)
    layers: list[Any] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), (function or nn.Tanh)()]
    layers[-1] = (last or nn.Identity)()
    return nn.Sequential(*layers).double()


def batches(inputs: int, outputs: int, count: int = 2, samples: int = 5) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    return [
        tuple(torch.randn(samples, n, generator=generator, dtype=torch.float64) for n in (inputs, outputs))
        for _ in range(count)
    ]


def whole_hessian(model: Any, loss: Any, data: Any) -> dict[str, Any]:
    """The diagonal of torch.autograd.functional.hessian over all parameters at once."""
    names = [name for name, _ in model.named_parameters()]
    values = tuple(p.detach() for p in model.parameters())

    def objective(*given: Any) -> Any:
        state = dict(zip(names, given, strict=True))
        return sum(loss(torch.func.functional_call(model, state, (x,)), t) for x, t in data) / len(data)

    blocks = torch.autograd.functional.hessian(objective, values)
    return {
        name: blocks[k][k].reshape(v.numel(), v.numel()).diagonal().view_as(v)
        for k, (name, v) in enumerate(zip(names, values, strict=True))
    }


def assert_equal(found: dict[str, Any], expected: dict[str, Any], only: Any = None) -> None:
    for name in only or expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-12)


def convolutional() -> Any:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(2, 2, 2), nn.Sigmoid(), nn.Flatten(),
        nn.Linear(8, 3),
    ).double()  # fmt: skip


# --- exact -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.CrossEntropyLoss()])
def test_exact_is_autograds_hessian(loss: Any) -> None:
    model, data = network(4, 5, 4, 3), batches(4, 3)
    if isinstance(loss, nn.CrossEntropyLoss):
        data = [(x, t.argmax(1)) for x, t in data]
    expected = whole_hessian(model, loss, data)
    assert_equal(obd.hessian_diagonal(model, loss, data, "exact"), expected)
    weights = dict(model.named_parameters())
    assert_equal(
        obd.saliencies(model, loss, data),
        {name: 0.5 * h * weights[name].detach() ** 2 for name, h in expected.items()},
    )


def test_exact_with_shared_and_unused_weights() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twice = nn.Linear(3, 3)
            self.never = nn.Linear(2, 2)
            self.scale = nn.Parameter(torch.tensor(0.7))

        def forward(self, x: Any) -> Any:
            return torch.tanh(self.twice(torch.tanh(self.twice(x)))) * self.scale

    torch.manual_seed(0)
    model, data = Odd().double(), batches(3, 3)
    found = obd.hessian_diagonal(model, nn.MSELoss(), data)
    assert_equal(found, whole_hessian(model, nn.MSELoss(), data))
    assert not found["never.weight"].any()


# --- the paper's recursion ---------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [nn.Tanh, nn.Sigmoid, nn.Softplus, nn.GELU])
def test_recursion_is_exact_in_one_layer(function: Any) -> None:
    model, data = network(4, 3, last=function), batches(4, 3)
    assert_equal(
        obd.hessian_diagonal(model, nn.MSELoss(), data, "recursion"), whole_hessian(model, nn.MSELoss(), data)
    )


def test_recursion_is_exact_in_the_last_two_layers_and_an_approximation_below() -> None:
    model, data, loss = network(4, 5, 4, 3, last=nn.Sigmoid), batches(4, 3), nn.MSELoss()
    found, expected = obd.hessian_diagonal(model, loss, data, "recursion"), whole_hessian(model, loss, data)
    assert_equal(found, expected, ("2.weight", "2.bias", "4.weight", "4.bias"))
    assert not torch.allclose(found["0.weight"], expected["0.weight"], rtol=1e-3)
    assert (
        torch.corrcoef(torch.stack([found["0.weight"].flatten(), expected["0.weight"].flatten()]))[0, 1] > 0.5
    )


def test_recursion_with_outputs_that_mix_is_exact_in_the_last_layer() -> None:
    model, loss = network(4, 5, 3), nn.CrossEntropyLoss()
    data = [(x, t.argmax(1)) for x, t in batches(4, 3)]
    found, expected = obd.hessian_diagonal(model, loss, data, "recursion"), whole_hessian(model, loss, data)
    assert_equal(found, expected, ("2.weight", "2.bias"))
    assert not torch.allclose(found["0.weight"], expected["0.weight"], rtol=1e-3)


def test_recursion_sums_over_connections_that_share_a_weight() -> None:
    """Equation 6: with a copy of the weight at each place, as if they were not shared, the sum of the copies' h."""
    torch.manual_seed(0)
    conv = nn.Conv2d(1, 1, 2).double()
    head = nn.Linear(4, 2).double()
    x = torch.randn(3, 1, 3, 3, dtype=torch.float64)
    target = torch.randn(3, 2, dtype=torch.float64)
    model = nn.Sequential(conv, nn.Tanh(), nn.Flatten(), head)
    found = obd.hessian_diagonal(model, nn.MSELoss(), [(x, target)], "recursion")
    patches = nn.functional.unfold(x, 2).transpose(1, 2)  # (samples, places, 4)
    copies = conv.weight.detach().view(4).repeat(4, 1)  # (places, 4)

    def objective(weights: Any) -> Any:
        return nn.functional.mse_loss(head(torch.tanh((patches * weights).sum(-1) + conv.bias)), target)

    whole = torch.autograd.functional.hessian(objective, copies).view(16, 16).diagonal().view(4, 4)
    torch.testing.assert_close(found["0.weight"].view(4), whole.sum(0), rtol=1e-9, atol=1e-12)
    exact = obd.hessian_diagonal(model, nn.MSELoss(), [(x, target)])["0.weight"]
    assert not torch.allclose(found["0.weight"], exact, rtol=1e-3)  # what the paper leaves out


def test_recursion_through_a_convolutional_network() -> None:
    torch.manual_seed(0)
    model = convolutional()
    data = [(torch.randn(4, 1, 6, 6, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64))]
    found, expected = (obd.hessian_diagonal(model, nn.MSELoss(), data, m) for m in ("recursion", "exact"))
    assert_equal(found, expected, ("6.weight", "6.bias"))
    flat = [torch.cat([h.flatten() for h in d.values()]) for d in (found, expected)]
    assert torch.corrcoef(torch.stack(flat))[0, 1] > 0.8


def test_recursion_refuses_what_it_has_no_rule_for() -> None:
    with pytest.raises(HpcdlError, match="no rule for LayerNorm"):
        obd.saliencies(
            nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)).double(), nn.MSELoss(), batches(3, 3), "recursion"
        )
    with pytest.raises(HpcdlError, match=r"nn\.Sequential, not Linear"):
        obd.saliencies(nn.Linear(3, 3).double(), nn.MSELoss(), batches(3, 3), "recursion")


# --- estimates ---------------------------------------------------------------------------------------------


def test_hutchinson_converges_to_the_exact_diagonal() -> None:
    model, data, loss = network(3, 4, 2), batches(3, 2), nn.MSELoss()
    expected = torch.cat([h.flatten() for h in whole_hessian(model, loss, data).values()])
    probes = 200

    def draw(seed: int) -> Any:
        found = obd.hessian_diagonal(model, loss, data, "hutchinson", probes=1, seed=seed)
        return torch.cat([h.flatten() for h in found.values()])

    draws = torch.stack([draw(seed) for seed in range(probes)])
    wrong = (draws.mean(0) - expected).abs()
    error = draws.std(0) / probes**0.5
    assert (wrong <= 4.5 * error + 1e-12).all()
    many = obd.hessian_diagonal(model, loss, data, "hutchinson", probes=1000, seed=1)
    few = obd.hessian_diagonal(model, loss, data, "hutchinson", probes=5, seed=1)
    distance = [torch.cat([h.flatten() for h in d.values()]).sub(expected).norm() for d in (many, few)]
    assert distance[0] < 0.2 * distance[1]


def test_hutchinson_of_a_diagonal_hessian_is_exact_with_one_probe() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64))

        def forward(self, x: Any) -> Any:
            return (x * self.w**3).sum(1)

    x, t = torch.rand(4, 3, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    model, data = Own(), [(x, t)]
    found = obd.hessian_diagonal(model, lambda o, _: o.mean(), data, "hutchinson", probes=1)["w"]
    torch.testing.assert_close(found, 6 * model.w.detach() * x.mean(0))


def jacobian_form(model: Any, data: Any, output_hessian: Any) -> dict[str, Any]:
    """Jᵀ·H_L·J's diagonal, with J from torch.autograd.functional.jacobian."""
    names = [name for name, _ in model.named_parameters()]
    values = tuple(p.detach() for p in model.parameters())
    found = {name: torch.zeros_like(v) for name, v in zip(names, values, strict=True)}
    for x, _ in data:
        jacobians = torch.autograd.functional.jacobian(
            lambda *given, x=x: torch.func.functional_call(model, dict(zip(names, given, strict=True)), (x,)),
            values,
        )
        for n in range(len(x)):
            hessian = output_hessian(model(x)[n].detach()) / (len(x) * len(data))
            for name, jacobian in zip(names, jacobians, strict=True):
                flat = jacobian[n].flatten(1)
                found[name] += torch.einsum("ik,ij,jk->k", flat, hessian, flat).view_as(found[name])
    return found


def of_cross_entropy(outputs: Any) -> Any:
    p = outputs.softmax(0)
    return torch.diag(p) - torch.outer(p, p)


def test_gauss_newton_is_the_jacobians_form() -> None:
    model, loss = network(4, 5, 3), nn.CrossEntropyLoss()
    data = [(x, t.argmax(1)) for x, t in batches(4, 3)]
    expected = jacobian_form(model, data, of_cross_entropy)
    assert_equal(obd.hessian_diagonal(model, loss, data, "gauss_newton"), expected)
    squared = jacobian_form(model, batches(4, 3), lambda o: torch.eye(3, dtype=torch.float64) * 2 / 3)
    assert_equal(obd.hessian_diagonal(model, nn.MSELoss(), batches(4, 3), "gauss_newton"), squared)
    estimate = obd.hessian_diagonal(model, loss, data, "gauss_newton", probes=2000)
    for name, h in expected.items():
        assert (estimate[name] - h).norm() < 0.1 * h.norm()


def test_gauss_newton_is_the_hessian_where_the_network_is_linear() -> None:
    model, data = network(4, 3), [(x, t.argmax(1)) for x, t in batches(4, 3)]
    loss = nn.CrossEntropyLoss()
    assert_equal(obd.hessian_diagonal(model, loss, data, "gauss_newton"), whole_hessian(model, loss, data))


def test_fisher_is_the_mean_square_of_single_samples_gradients() -> None:
    model, data, loss = network(3, 4, 2), batches(3, 2), nn.MSELoss()
    found = obd.hessian_diagonal(model, loss, data, "fisher")["0.weight"]
    singles = [
        torch.autograd.grad(loss(model(x[n : n + 1]), t[n : n + 1]), model[0].weight)[0]
        for x, t in data
        for n in range(5)
    ]
    torch.testing.assert_close(found, torch.stack(singles).square().mean(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "exactly"}, "no method exactly"),
        ({"parameters": ["0.wight"]}, "no trained parameter 0.wight; there are 0.weight"),
        ({"batches": []}, "at least one batch"),
    ],
)
def test_what_cannot_be_is_said(options: dict[str, Any], message: str) -> None:
    with pytest.raises(HpcdlError, match=message):
        obd.saliencies(network(3, 2), nn.MSELoss(), **{"batches": batches(3, 2), **options})


# --- prune and retrain -------------------------------------------------------------------------------------


def test_saliency_predicts_the_rise_of_the_error() -> None:
    """Of a quadratic error with a diagonal Hessian the sum of saliencies is the rise itself, in the minimum."""
    x = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64))
    model = nn.Linear(4, 1, bias=False).double()
    target = model(x).detach()
    loss = nn.MSELoss()
    done = list(obd.prune_and_retrain(model, lambda m: obd.saliencies(m, loss, [(x, target)]), None, [0.5]))
    assert [r.deleted for r in done] == [2]
    assert loss(model(x), target).item() == pytest.approx(done[0].predicted, rel=1e-9)


def test_deleted_weights_stay_deleted_whatever_retrains() -> None:
    model, data, loss = network(4, 6, 3), batches(4, 3), nn.MSELoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)

    def retrain(m: Any) -> None:
        for _ in range(5):
            for x, t in data:
                optimizer.zero_grad()
                loss(m(x), t).backward()
                optimizer.step()

    retrain(model)  # momentum from before
    total = sum(p.numel() for p in model.parameters())
    before: set[Any] = set()
    for done in obd.prune_and_retrain(
        model, lambda m: obd.saliencies(m, loss, data), retrain, [0.2, 0.4, 0.6]
    ):
        zeros = {
            (n, k)
            for n, p in model.named_parameters()
            for k in (p == 0).flatten().nonzero().flatten().tolist()
        }
        assert len(zeros) == done.deleted and before <= zeros
        before = zeros
    assert len(before) == int(total * 0.6)
