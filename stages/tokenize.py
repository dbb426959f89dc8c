"""Train the tokenizer and write the documents as tokens. `python -m stages.tokenize`"""

from __future__ import annotations

from core.cli import command, say
from core.project import Project


@command("tokenize")
def main(project: Project) -> None:
    """Train the tokenizer and write token shards."""
    from core.model_config import ModelConfig
    from core.tokens import tokenize

    params = project.params
    block_size = ModelConfig.resolve(params.model, params.tokenizer.n_vocab).block_size
    tokenize(project, say, min_tokens=block_size + 1)


if __name__ == "__main__":
    main()
