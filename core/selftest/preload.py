"""What a fork server imports once, so that each life begins in a fraction of a second. It runs nothing."""

from importlib import import_module

for name in (
    "torch",
    "torch._dynamo",
    "accelerate",
    "numpy",
    "pydantic",
    "ruamel.yaml",
    "tiktoken",
    "core.trainer",
):
    import_module(name)
for name in ("core.cli", "core.env_check", "core.evaluate", "core.launch", "core.corpus", "core.tokens"):
    import_module(name)
