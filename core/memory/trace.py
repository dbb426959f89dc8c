"""Follows every storage that torch's operations make and drop, fake or real, and writes a tape of it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from core.memory.allocator import KINDS
from core.memory.tape import Operation, Tape

CODE = {name: i for i, name in enumerate(KINDS)}
VIEWS = {
    "detach",
    "view",
    "t",
    "transpose",
    "permute",
    "expand",
    "slice",
    "select",
    "split",
    "unsqueeze",
    "alias",
}
QUERIES = {torch.ops.prim.device.default}  # a fake tensor asks for its device through the dispatcher
MATRIX_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}


class Trace(TorchDispatchMode):
    """Tape of what happens inside the `with` block.

    sequences: the micro-batch that is run. Inside micro-batches a size that it divides is taken as proportional to it,
    so it should be a prime that divides no other dimension; 0 takes every size as constant.
    cuda: add what CUDA kernels allocate inside, and cuBLAS's workspaces; `workspace` is the size of one [bytes].
    vocab_size: the last dimension by which logits are known.
    """

    def __init__(
        self, sequences: int = 0, cuda: bool = False, workspace: int = 0, vocab_size: int = 0
    ) -> None:
        super().__init__()
        self.tape = Tape()
        self.sequences, self.cuda, self.workspace, self.vocab_size = sequences, cuda, workspace, vocab_size
        self.chunked_head = False
        self.phase = "weights"  # then optimizer, forward (and backward), update
        self.alive: dict[int, int] = {}  # storage → allocation
        # Allocation → layer, or None for none, of parameters, gradients and the optimizer's state.
        self.owner: dict[int, int | None] = {}
        self._share = 0.0
        self._watched: dict[int, weakref.ref] = {}
        self._workspaces: set[bool] = set()

    def relabel(self, tensors: Iterator[Any], kind: str) -> None:
        """Say what these tensors' memory is for."""
        for tensor in tensors:
            allocation = self.alive.get(tensor.untyped_storage()._cdata)
            if allocation is not None:
                self.tape.kind[allocation] = CODE[kind]

    def note(self, tensor: Any, layer: int | None) -> None:
        """Say which layer this tensor belongs to."""
        allocation = self.alive.get(tensor.untyped_storage()._cdata)
        if allocation is not None:
            self.owner[allocation] = layer

    def keep_activations(self, since: int) -> None:
        """What was made from allocation `since` on and is alive now is kept for backward, unless it is logits."""
        for allocation in self.alive.values():
            if allocation >= since and self.tape.kind[allocation] == CODE["temporaries"]:
                self.tape.kind[allocation] = CODE["activations"]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in QUERIES:
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args, **(kwargs or {}))
        name = func._overloadpacket.__name__
        if self.cuda and name in MATRIX_PRODUCTS:
            self._workspace()
        result = func(*args, **(kwargs or {}))
        flat = result if isinstance(result, (tuple, list)) else (result,)
        for out in flat:
            if isinstance(out, torch.Tensor):
                self._made(out, name)
            elif isinstance(out, (tuple, list)):
                for tensor in out:
                    if isinstance(tensor, torch.Tensor):
                        self._made(tensor, name)
        if self.cuda:
            for constant, per_sequence in kernel_temporaries(name, args, self.sequences):
                self._drop(
                    self._allocate(constant, per_sequence, f"{name} (inside the kernel)", "temporaries")
                )
        if self.phase != "weights" and name not in VIEWS:
            self._count(func, name, args, kwargs or {}, result)
        return result

    def _made(self, tensor: torch.Tensor, op: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.alive:
            return
        nbytes = storage.nbytes()
        if op == "native_layer_norm" and tensor.shape[-1:] == (1,):
            nbytes = 4 * tensor.numel()  # statistics are fp32, whatever a fake CPU says of bf16 input
        if nbytes == 0:
            return
        kind = self.phase if self.phase in CODE else "temporaries"
        if self.phase == "forward" and tensor.dim() > 1 and tensor.shape[-1] == self.vocab_size:
            kind = "logits"
        constant, per_sequence = nbytes, 0.0
        if self.sequences and self.phase == "forward" and nbytes % self.sequences == 0:
            constant, per_sequence = 0, nbytes / self.sequences
        self.alive[key] = self._allocate(constant, per_sequence, op, kind)

        def gone(_: Any, key: int = key) -> None:
            del self._watched[key]
            self._drop(self.alive.pop(key))

        self._watched[key] = weakref.ref(storage, gone)

    def _allocate(self, constant: int, per_sequence: float, op: str, kind: str) -> int:
        return self.tape.allocate(constant, per_sequence, CODE[kind], op)

    def _drop(self, allocation: int) -> None:
        self.tape.events.append(~allocation)

    def _workspace(self) -> None:
        """cuBLAS keeps one workspace per handle and stream: one for forward, one for autograd's thread."""
        backward = torch._C._current_graph_task_id() != -1
        if backward not in self._workspaces:
            self._workspaces.add(backward)
            self._allocate(self.workspace, 0.0, "cuBLAS workspace", "temporaries")

    def _count(self, func: Any, name: str, args: Any, kwargs: Any, result: Any) -> None:
        """FLOPs and memory traffic of an operation: what it reads and what it writes."""
        formula = flop_registry.get(func._overloadpacket)
        flops = float(formula(*args, **kwargs, out_val=result)) if formula else attention_flops(name, args)
        n = self.sequences if self.phase == "forward" else 0
        # A loop over chunks of tokens goes round more often with more sequences, at constant sizes.
        in_chunks = self.chunked_head and self.tape.segments[-1].part.startswith("head")
        once = each = 0
        for nbytes in map(_nbytes, _tensors((args, result))):
            if n and (in_chunks or nbytes % n == 0):
                each += nbytes
            else:
                once += nbytes
        if n:
            operation = Operation(flops / n, each / n, 0.0, once)
        else:
            operation = Operation(0.0, 0.0, flops, once, self._of_layers(args))
        self.tape.roofline.append(operation)

    def _of_layers(self, args: Any) -> float:
        """The share of an operation that is for parameters of layers.

        One that holds no parameter, gradient or state works on what the operation before it has left.
        """
        inside = outside = 0
        for tensor in _tensors(args):
            allocation = self.alive.get(tensor.untyped_storage()._cdata)
            if allocation in self.owner and tensor.dim():  # a count of steps is neither here nor there
                if self.owner[allocation] is None:
                    outside += _nbytes(tensor)
                else:
                    inside += _nbytes(tensor)
        if inside or outside:
            self._share = inside / (inside + outside)
        return self._share


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def attention_flops(name: str, args: Any) -> float:
    """FLOPs of torch's fused attention on a CPU, which its own counter leaves out: causal, so half of the square.

    Forward 4 B H T T D, backward 2.5 times that (Dao et al. 2022, arXiv 2205.14135).
    """
    if "flash_attention_for_cpu" not in name:
        return 0.0
    backward = "backward" in name
    q = args[1] if backward else args[0]
    B, H, T, D = q.shape
    return 4.0 * B * H * T * T * D / 2 * (2.5 if backward else 1)


def kernel_temporaries(name: str, args: Any, sequences: int) -> list[tuple[int, float]]:
    """What a CUDA kernel allocates inside and frees at its end: (constant, per sequence) [bytes].

    From torch 2.13's sources: flash attention's backward (aten/src/ATen/native/transformers/cuda/flash_attn), the
    embedding's sorted backward (aten/src/ATen/native/cuda/EmbeddingBackwardKernel.cu), logsumexp (ReduceOps.cpp).
    """
    n = max(sequences, 1)

    def each(nbytes: float) -> tuple[int, float]:
        return (0, nbytes / n) if sequences else (int(nbytes), 0.0)

    if "flash_attention" in name and "backward" in name:  # fp32 gradient of q, and its row sums
        B, H, T, D = args[1].shape
        T, D = -(-T // 128) * 128, -(-D // 32) * 32
        return [each(B * H * T * D * 4 + B * H * T * 4)]
    if name == "embedding_dense_backward":  # sorted ids and positions, and partial sums per 10 tokens
        tokens, width = args[1].numel(), args[0].shape[-1]
        constant, per_sequence = each(tokens * (32 + width * 4 / 10))
        return [(constant + 4096 * width * 4, per_sequence)] if sequences or tokens > 3072 else []
    if name == "logsumexp":
        return [each(args[0].numel() * args[0].element_size())]
    return []
