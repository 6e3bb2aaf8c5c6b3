"""Optimisers: lazy ones for embedding tables, fused AdamW for the rest.

A table's gradient is sparse: it names the rows that were looked up. The lazy optimisers read, update and write only
those rows, so a step costs the same whether the table has a thousand rows or a hundred million. The price is that the
moments of a row which is not looked up do not decay in the meantime.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from funnelrec.learn.adagrad import Adagrad
from funnelrec.learn.ftrl import FTRL
from funnelrec.learn.regularise import Proximal, RowL2
from funnelrec.learn.rows import lazy_zeros, put, refuse_closure, require_positive, subtract, take, touched

__all__ = ["LazyAdam", "Optimizers", "RowwiseAdagrad", "TableOptimizer", "make_optimizers", "split_parameters"]

TableOptimizer = Literal["lazy_adam", "rowwise_adagrad", "adagrad"]


class LazyAdam(Optimizer):
    """Adam that touches only the rows in a sparse gradient; on a dense gradient it is Adam.

    Source: Kingma and Ba, 2015, algorithm 1, applied to the touched rows; the bias correction counts all steps.
    The gradient of a row that occurs several times is summed before it is used.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        require_positive("lr", lr)
        require_positive("eps", eps)
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must lie in [0, 1), received {betas}")
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient."""
        refuse_closure(closure)
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros(())
                    state["exp_avg"] = lazy_zeros(parameter.shape, parameter)
                    state["exp_avg_sq"] = lazy_zeros(parameter.shape, parameter)
                state["step"] += 1
                count = int(state["step"])
                rate = group["lr"] / (1 - beta1**count)
                second = math.sqrt(1 - beta2**count)
                rows, gradient = touched(parameter.grad)
                mean, square = take(state["exp_avg"], rows), take(state["exp_avg_sq"], rows)
                mean.lerp_(gradient, 1 - beta1)
                square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
                put(state["exp_avg"], rows, mean)
                put(state["exp_avg_sq"], rows, square)
                change = square.sqrt() if rows is None else square.sqrt_()
                change.div_(second).add_(group["eps"])
                torch.div(mean, change, out=change)
                subtract(parameter, rows, change, rate)
        return None


class RowwiseAdagrad(Optimizer):
    """Adagrad with one accumulator a row: the sum over steps of the mean squared gradient of that row.

    It holds 1/D of the state of Adagrad and is the usual choice for very large tables (Naumov et al., 2019, DLRM).
    Works on sparse gradients (only their rows are touched) and on dense ones (rows with a zero gradient stay put).
    """

    def __init__(self, params: Iterable[Tensor], lr: float = 1e-2, eps: float = 1e-8) -> None:
        require_positive("lr", lr)
        require_positive("eps", eps)
        super().__init__(params, {"lr": lr, "eps": eps})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient."""
        refuse_closure(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["sum"] = lazy_zeros(parameter.shape[:1], parameter)
                rows, gradient = touched(parameter.grad)
                total = take(state["sum"], rows)
                total.add_(gradient.square().flatten(1).mean(1))  # (rows,)
                put(state["sum"], rows, total)
                scale = (total.sqrt() + group["eps"]).view(-1, *[1] * (gradient.dim() - 1))
                subtract(parameter, rows, gradient / scale, group["lr"])
        return None


class Optimizers:
    """Several optimisers driven as one; `state_dict` holds flat named tensors and JSON-able values, nothing else.

    `row_l2` is added to the gradients of `tables` before the optimisers step.
    """

    def __init__(
        self, optimizers: Iterable[Optimizer], *, row_l2: RowL2 | None = None, tables: Iterable[Tensor] = ()
    ) -> None:
        self.optimizers = tuple(optimizers)
        self.row_l2 = row_l2
        self.tables = tuple(tables)
        self._base = [[group["lr"] for group in o.param_groups] for o in self.optimizers]

    def step(self) -> None:
        """One update by every optimiser."""
        if self.row_l2 is not None:
            for table in self.tables:
                self.row_l2.add_to(table)
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def set_lr_factor(self, factor: float) -> None:
        """Every learning rate becomes its starting value times `factor` (learn/schedules.py); FTRL keeps its own."""
        for optimizer, rates in zip(self.optimizers, self._base, strict=True):
            if isinstance(optimizer, FTRL):
                continue
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor

    def state_dict(self) -> dict[str, Any]:
        """`{"tensors": {name: Tensor}, "values": JSON}`; a name is optimiser.parameter.field, all counted from 0."""
        tensors: dict[str, Tensor] = {}
        groups = []
        for number, optimizer in enumerate(self.optimizers):
            state = optimizer.state_dict()
            groups.append(_jsonable(state["param_groups"]))
            for parameter, fields in state["state"].items():
                for field, value in fields.items():
                    tensors[f"{number}.{parameter}.{field}"] = torch.as_tensor(value)
        return {"tensors": tensors, "values": {"kinds": self._kinds, "groups": groups, "base": self._base}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave. Raises ValueError when it belongs to other optimisers."""
        values = state["values"]
        if values["kinds"] != self._kinds:
            raise ValueError(f"the saved state belongs to the optimisers {values['kinds']}, these are {self._kinds}")
        per_optimizer: list[dict[int, dict[str, Tensor]]] = [{} for _ in self.optimizers]
        for name, tensor in state["tensors"].items():
            number, parameter, field = name.split(".", 2)
            per_optimizer[int(number)].setdefault(int(parameter), {})[field] = tensor.clone()
        for optimizer, fields, groups in zip(self.optimizers, per_optimizer, values["groups"], strict=True):
            optimizer.load_state_dict({"state": fields, "param_groups": groups})
            for group in optimizer.param_groups:
                if "betas" in group:
                    group["betas"] = tuple(group["betas"])
        self._base = [list(rates) for rates in values["base"]]

    @property
    def _kinds(self) -> list[str]:
        return [type(optimizer).__name__ for optimizer in self.optimizers]


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The model's trainable parameters as (tables with sparse gradients, everything else), in order of definition.

    A table is the weight of a module that says so: `sparse` True (torch's embeddings) or `dense` False
    (`core.nn.embedding.Table`).
    """
    sparse = {
        id(module.weight)
        for module in model.modules()
        if isinstance(getattr(module, "weight", None), nn.Parameter)
        and (getattr(module, "sparse", False) is True or getattr(module, "dense", True) is False)
    }
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tables = [parameter for parameter in trainable if id(parameter) in sparse]
    return tables, [parameter for parameter in trainable if id(parameter) not in sparse]


def make_optimizers(
    model: nn.Module,
    lr: float = 1e-3,
    table_lr: float | None = None,
    table: TableOptimizer = "lazy_adam",
    weight_decay: float = 0.0,
    *,
    momentum: float = 0.0,
    table_l2: float | RowL2 = 0.0,
    ftrl: Mapping[str, Mapping[str, float]] | None = None,
    proximal: Mapping[str, Mapping[str, float]] | None = None,
    lr_factors: Mapping[str, float] | None = None,
) -> Optimizers:
    """A lazy optimiser for the tables (`table_lr`, else `lr`) and fused AdamW for the rest of the model.

    `table` "adagrad" (learn/adagrad.py, with `momentum`) trains the rest too, without AdamW.
    `weight_decay` is decoupled and acts on the dense part only: decaying a whole table would touch all of its rows.
    `table_l2` holds the rows of a batch instead (`RowL2`, or its strength). `ftrl` and `proximal` name parameters by
    how they begin ("wide" for all of "wide.…"): the former are trained by `FTRL`, e.g.
    `{"wide": {"alpha": 0.1, "l1": 1.0}}`, after each step the latter are shrunk by `Proximal`, e.g.
    `{"weight": {"l1": 0.1, "l21": 0.1}}`. A parameter may be named once.
    `lr_factors` names parts of the rest whose rate is `lr` times a factor; of several that fit the longest name counts.
    """
    kinds: dict[str, Callable[..., Optimizer]] = {
        "lazy_adam": LazyAdam,
        "rowwise_adagrad": RowwiseAdagrad,
        "adagrad": partial(Adagrad, momentum=momentum),
    }
    if table != "adagrad" and momentum:
        raise ValueError(f"momentum belongs to table='adagrad', received {momentum} with table={table!r}")
    if table == "adagrad" and weight_decay:
        raise ValueError(f"table='adagrad' has no weight_decay, received {weight_decay}; use table_l2")
    if table not in kinds:
        raise ValueError(f"table must be one of {', '.join(kinds)}, received {table!r}")
    require_positive("lr", lr)
    rate = lr if table_lr is None else table_lr
    tables, dense = split_parameters(model)
    by_ftrl = _named(model, ftrl or {})
    shrunk = _named(model, proximal or {})
    _named_once(model, [*by_ftrl.values(), *shrunk.values()])
    apart = {id(p) for named in by_ftrl.values() for p in named}
    optimizers: list[Optimizer] = []
    if rest := [p for p in tables if id(p) not in apart]:
        optimizers.append(kinds[table](rest, lr=rate))
    if rest := [p for p in dense if id(p) not in apart]:
        groups = _by_rate(model, rest, lr, lr_factors or {})
        optimizers.append(
            kinds[table](groups, lr=lr)
            if table == "adagrad"
            else AdamW(groups, lr=lr, weight_decay=weight_decay, fused=True)
        )
    for prefix, options in (ftrl or {}).items():
        optimizers.append(FTRL(by_ftrl[prefix], **options))
    if not optimizers:
        raise ValueError(
            f"{type(model).__name__} has no trainable parameter; fit it with its own method, if it has one"
        )
    sparse = {id(p) for p in tables}
    for prefix, options in (proximal or {}).items():
        for own, its_rate in ((True, rate), (False, lr)):  # each shrinks at the rate at which it is trained
            if rest := [p for p in shrunk[prefix] if (id(p) in sparse) == own]:
                optimizers.append(Proximal(rest, lr=its_rate, **options))
    held = [p for p in tables if id(p) not in apart]
    return Optimizers(optimizers, row_l2=_row_l2(table_l2, held), tables=held)


def _row_l2(given: float | RowL2, tables: list[nn.Parameter]) -> RowL2 | None:
    """The penalty, its counts where the tables are."""
    if not given or not tables:
        return None
    held = given if isinstance(given, RowL2) else RowL2(given)
    return held if held.counts is None else replace(held, counts=held.counts.to(tables[0].device))


def _by_rate(
    model: nn.Module, parameters: list[nn.Parameter], lr: float, factors: Mapping[str, float]
) -> list[dict[str, Any]]:
    """One group of parameters for each factor."""
    factor = {id(parameter): 1.0 for parameter in parameters}
    for prefix in sorted(factors, key=len):
        require_positive(f"the factor of '{prefix}'", factors[prefix])
        for parameter in _named(model, [prefix])[prefix]:
            factor[id(parameter)] = factors[prefix]
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(factor[id(parameter)], []).append(parameter)
    return [{"params": group, "lr": lr * times} for times, group in groups.items()]


def _named(model: nn.Module, prefixes: Iterable[str]) -> dict[str, list[nn.Parameter]]:
    """For each prefix the trainable parameters whose name is it, or begins with it and a dot."""
    named = {
        prefix: [
            parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and (name == prefix or name.startswith(f"{prefix}."))
        ]
        for prefix in prefixes
    }
    for prefix, parameters in named.items():
        if not parameters:
            parts = dict.fromkeys(name.partition(".")[0] for name, _ in model.named_parameters())
            raise ValueError(f"{type(model).__name__} has no parameter '{prefix}'; its parts are {', '.join(parts)}")
    return named


def _named_once(model: nn.Module, chosen: list[list[nn.Parameter]]) -> None:
    """Two optimisers must not step one parameter, and FTRL, which remembers sums, must not be shrunk by another."""
    times = Counter(id(parameter) for parameters in chosen for parameter in parameters)
    for name, parameter in model.named_parameters():
        if times[id(parameter)] > 1:
            raise ValueError(
                f"'{name}' is named twice by ftrl and proximal; name it once (FTRL has l1 and l2 of its own)"
            )


def _jsonable(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: list(v) if isinstance(v, tuple) else v for k, v in group.items()} for group in groups]
