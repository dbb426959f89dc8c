"""Bytes that autograd keeps per token and layer: the figures behind `ModelConfig.step_bytes`.

    python -m bench.activation_bytes

Counts the distinct storages saved for backward in two networks that differ by one layer, on the CPU; parameters and
logits drop out of the difference. In units of C = n_embd.
"""

from __future__ import annotations

import torch

from core.model import build_model
from core.model_config import ModelConfig
from core.params import ModelParams


def saved_bytes(architecture: str, n_layer: int, dtype: str, sizes: dict[str, int]) -> int:
    params = ModelParams(architecture=architecture, n_layer=n_layer, **sizes)
    model = build_model(ModelConfig.resolve(params, 512), seed=1)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()} | {
        b.untyped_storage().data_ptr() for b in model.buffers()
    }
    kept: dict[int, int] = {}
    held = []  # so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    tokens = torch.zeros(2, sizes["block_size"], dtype=torch.long)
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != "fp32")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), autocast:
        loss = model(tokens, tokens)
    del loss
    return sum(kept.values())


def main() -> None:
    print(
        "| architecture | n_embd | dtype | bytes per token and layer | in units of C |\n|---|---|---|---|---|"
    )
    for architecture in ("qwen3", "gpt2"):
        for n_embd in (384, 768):
            sizes = {"n_embd": n_embd, "n_head": n_embd // 64, "block_size": 256}
            for dtype in ("bf16", "fp32"):
                two, one = (saved_bytes(architecture, n, dtype, sizes) for n in (2, 1))
                each = (two - one) / (2 * sizes["block_size"])
                weights = 0
                if (
                    dtype != "fp32"
                ):  # autocast's copies of the layer's matrices are saved too, and counted elsewhere
                    a, b = (
                        ModelConfig.resolve(
                            ModelParams(architecture=architecture, n_layer=n, **sizes), 512
                        ).matmul_params
                        for n in (2, 1)
                    )
                    weights = 2 * (a - b) / (2 * sizes["block_size"])
                print(
                    f"| {architecture} | {n_embd} | {dtype} | {each - weights:,.0f} | {(each - weights) / n_embd:.1f} |"
                )


if __name__ == "__main__":
    main()
