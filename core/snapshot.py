"""Everything that decides how a run goes on, out of a training and back into one, bit for bit.

Weights, the optimizer's state by the names of the parameters, gradients of an unfinished accumulation window, the loss
scaler, random states, and what strategies want kept. The order of the data is a function of seed and position
(core/batches.py), so a number stands for it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core.checkpoint import Checkpoint, dtype_name
from core.errors import PluginError, UserError

if TYPE_CHECKING:
    from torch import Tensor

    from core.hookspecs import Build

PLAIN = (bool, int, float, str, type(None))


def capture(build: Build) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, not copied, and plain values. Raises PluginError where an optimizer keeps what no checkpoint can."""
    tensors = {f"model/{name}": t for name, t in _weights(build).items()}
    inner, plain = _inner(build), dict[str, Any]()
    for name, p in build.network.named_parameters():
        if p.grad is not None:
            tensors[f"gradient/{name}"] = p.grad
        for key, value in inner.state.get(p, {}).items():
            if _is_tensor(value) and dtype_name(value):
                tensors[f"optimizer/{key}/{name}"] = value
            else:
                plain.setdefault(name, {})[key] = _checked(value, f"state[{key!r}]", inner)
    groups = [
        {key: _checked(value, f"group[{key!r}]", inner) for key, value in group.items() if key != "params"}
        for group in inner.param_groups
    ]
    scaler = build.accelerator.scaler
    state = {
        "optimizer": plain,
        "groups": groups,
        "scaler": scaler.state_dict() if scaler is not None else None,
    }
    return tensors, state


def restore(build: Build, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Put `capture`'s values back; nothing is touched unless all of them fit. Returns the tensors that are not ours.

    Raises UserError naming what does not fit.
    """
    import torch

    parameters = dict(build.network.named_parameters())
    weights, inner = _weights(build), _inner(build)
    _require_fit(build, checkpoint)
    rest: dict[str, Tensor] = {}
    with torch.no_grad():
        for full, tensor in checkpoint.tensors():
            kind, _, name = full.partition("/")
            if kind == "model":
                weights[name].copy_(tensor)
            elif kind == "gradient":
                parameters[name].grad = tensor.to(parameters[name].device, copy=True)
            elif kind == "optimizer":
                key, _, name = name.partition("/")
                _put(inner.state[parameters[name]], key, tensor, parameters[name])
            else:
                rest[full] = tensor.clone()
    for name, values in checkpoint.state["optimizer"].items():
        inner.state[parameters[name]].update(values)
    for group, values in zip(inner.param_groups, checkpoint.state["groups"], strict=True):
        group.update({key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})
    if build.accelerator.scaler is not None and checkpoint.state["scaler"]:
        build.accelerator.scaler.load_state_dict(checkpoint.state["scaler"])
    return rest


def _put(state: dict[str, Any], key: str, tensor: Tensor, p: Tensor) -> None:
    """In place where there is one, so that memory that was planned stays as planned."""
    there: Any = state.get(key)
    if _is_tensor(there) and there.shape == tensor.shape and there.dtype == tensor.dtype:
        there.copy_(tensor)
    else:
        state[key] = tensor.to(p.device, copy=True)


def _require_fit(build: Build, checkpoint: Checkpoint) -> None:
    """Raise UserError unless a checkpoint holds what this training has, in these shapes, and nothing for others."""
    weights, inner = _weights(build), _inner(build)
    wanted = {f"model/{name}": t for name, t in weights.items()}
    for name, p in build.network.named_parameters():
        state = inner.state.get(p, {})
        wanted |= {f"optimizer/{key}/{name}": t for key, t in state.items() if _is_tensor(t)}
    problems = [f"without {name}" for name in sorted(wanted.keys() - checkpoint.shapes.keys())]
    for full, (dtype, shape) in sorted(checkpoint.shapes.items()):
        kind, _, name = full.partition("/")
        name = name.partition("/")[2] if kind == "optimizer" else name
        like = wanted.get(full, weights.get(name) if kind == "gradient" else None)
        if kind in ("model", "gradient", "optimizer") and name not in weights:
            problems.append(f"with {full}")
        elif like is not None and (dtype, shape) != (dtype_name(like), tuple(like.shape)):
            problems.append(f"{full} is {dtype} {shape}, here {dtype_name(like)} {tuple(like.shape)}")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(
            f"{checkpoint.path} is no checkpoint of this training: {'; '.join(problems[:3])}{more}"
        )


def _weights(build: Build) -> dict[str, Tensor]:
    """Parameters and buffers that are saved; what is tied once, under its first name."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in build.network.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())


def _inner(build: Build) -> Any:
    """The optimizer without accelerate's wrapper."""
    return getattr(build.optimizer, "optimizer", build.optimizer)


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _checked(value: Any, where: str, optimizer: Any) -> Any:
    """A plain value, or a list of them. Raises PluginError for anything else."""
    if isinstance(value, PLAIN) or (
        isinstance(value, list | tuple) and all(isinstance(v, PLAIN) for v in value)
    ):
        return value
    raise PluginError(
        f"{type(optimizer).__name__}.{where} is a {type(value).__name__}: a checkpoint keeps tensors, numbers, "
        "texts and lists of them; let the optimizer hold one of those"
    )


# --- random states -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RandomState:
    """Every generator that training may draw from: torch's on the CPU and on the card in use, NumPy's and Python's."""

    torch: Tensor
    cuda: Tensor | None
    numpy: Any
    python: Any

    @classmethod
    def now(cls, device: Any) -> RandomState:
        """As it is at the moment; some microseconds, and nothing is drawn."""
        import numpy as np
        import torch

        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(torch.get_rng_state(), cuda, np.random.get_state(), random.getstate())

    def restore(self, device: Any) -> None:
        """Put it back. Do it last: much of what builds a training draws numbers."""
        import numpy as np
        import torch

        torch.set_rng_state(self.torch)
        if device.type == "cuda" and self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, device)
        np.random.set_state(self.numpy)
        random.setstate(self.python)

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """{prefix/name: tensor}, for a checkpoint."""
        import numpy as np
        import torch

        _, key, *rest = self.numpy
        version, words, following = self.python
        found = {
            "torch": self.torch,
            "numpy": torch.from_numpy(key.astype(np.int64)),
            "numpy_rest": torch.tensor(rest, dtype=torch.float64),
            "python": torch.tensor([version, *words], dtype=torch.int64),
            "python_rest": torch.tensor([] if following is None else [following], dtype=torch.float64),
        }
        found |= {} if self.cuda is None else {"cuda": self.cuda}
        return {f"{prefix}/{name}": tensor for name, tensor in found.items()}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], prefix: str) -> RandomState | None:
        """From the tensors under a prefix; None where there are none."""
        import numpy as np

        t = unnamed(prefix, tensors)
        if "torch" not in t:
            return None
        position, has_gauss, gauss = t["numpy_rest"].tolist()
        key = t["numpy"].numpy().astype(np.uint32)
        version, *words = t["python"].tolist()
        following = next(iter(t["python_rest"].tolist()), None)
        numpy = ("MT19937", key, int(position), int(has_gauss), gauss)
        return cls(t["torch"], t.get("cuda"), numpy, (version, tuple(words), following))


def unnamed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under a prefix, without it."""
    return {
        name.removeprefix(f"{prefix}/"): t for name, t in tensors.items() if name.startswith(f"{prefix}/")
    }
