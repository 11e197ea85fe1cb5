"""A character-level transformer trained on the source text of Python's standard library, float and then compressed.

Shows what happens to a language model: the token indices are skipped by themselves, embedding, attention and linear layers run in INT8, layer norms
stay in float between them.

Run: ``python recipes/char_transformer.py`` (about two minutes on two cores).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from digits_cnn import quiet
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_cco import CCOCallback
from lightning_cco.monitoring.tables import float_layers, text_table

FILES = (
    "argparse",
    "ast",
    "calendar",
    "configparser",
    "datetime",
    "difflib",
    "inspect",
    "optparse",
    "pathlib",
    "pickle",
    "tarfile",
    "typing",
)


class Block(nn.Module):
    """Causal self-attention and a multilayer perceptron, each after a layer norm and with a way around it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class CharTransformer(pl.LightningModule):
    """Predicts the next of 128 characters.

    Args:
        lr: Learning rate of AdamW.
        width: Size of an embedding.
        depth: Number of blocks.
        heads: Attention heads of each.
        length: Longest context.
    """

    def __init__(self, lr: float = 2e-3, width: int = 64, depth: int = 3, heads: int = 4, length: int = 64) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.embedding = nn.Embedding(128, width)
        self.positions = nn.Parameter(0.02 * torch.randn(1, length, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 128)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embedding(tokens) + self.positions[:, : tokens.shape[1]])))

    def loss(self, tokens: Tensor) -> Tensor:
        return F.cross_entropy(self(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    def training_step(self, tokens: Tensor, batch_idx: int) -> Tensor:
        loss = self.loss(tokens)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, tokens: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.loss(tokens))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"])


class Snippets(Dataset):
    """Stretches of text, one character longer than the context."""

    def __init__(self, text: bytes, length: int) -> None:
        self.text, self.length = torch.tensor(list(text)).clamp(max=127), length + 1

    def __len__(self) -> int:
        return len(self.text) // self.length

    def __getitem__(self, index: int) -> Tensor:
        return self.text[index * self.length : (index + 1) * self.length]


def load_text() -> bytes:
    """Source of a few modules of the standard library, in a fixed order."""
    folder = Path(os.__file__).parent
    paths = [path for name in FILES for path in (folder / f"{name}.py", folder / name / "__init__.py") if path.is_file()]
    return b"".join(path.read_bytes() for path in paths)


def main(argv: Sequence[str] | None = None) -> CCOCallback:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="w8a8", help="a shipped recipe or the path of a YAML file")
    parser.add_argument("--output", type=Path, default=Path("outputs/char_transformer"), help="folder for everything written")
    parser.add_argument("--fast", action="store_true", help="a few steps only")
    options = parser.parse_args(argv)
    quiet()
    pl.seed_everything(1)
    model = CharTransformer()
    text = load_text()
    cut = int(0.95 * len(text))
    length = model.hparams["length"]
    train = DataLoader(Snippets(text[:cut], length), 64, shuffle=True, drop_last=True)
    val = DataLoader(Snippets(text[cut:], length), 64)
    limits = {"max_epochs": 1, "limit_train_batches": 3, "limit_val_batches": 1} if options.fast else {"max_epochs": 6}
    common = {"default_root_dir": options.output, "logger": False, "enable_progress_bar": False, "enable_model_summary": False}

    print(f"\n1. Float training on {len(text):,} characters")
    trainer = pl.Trainer(**common, **limits, enable_checkpointing=False)
    trainer.fit(model, train)
    before = trainer.validate(model, val, verbose=False)[0]["val_loss"]

    print("\n2. Compression")
    model.hparams["lr"] /= 10
    cco = CCOCallback(options.recipe)
    trainer = pl.Trainer(**common, **limits | {"max_epochs": 1}, enable_checkpointing=False, callbacks=[cco])
    trainer.fit(model, train, val)
    after = trainer.validate(model, val, verbose=False)[0]["val_loss"]
    assert cco.quantized is not None
    plan = cco.quantized.plan
    rows = [["float", f"{before:.4f}"], ["INT8 (fake-quantized)", f"{after:.4f}"]]
    print("\n3. Result")
    print(text_table(["model", "validation loss (nats per character)"], rows, right=[1]))
    print(f"\n{plan.summary}. Left in float:")
    print(float_layers(plan))
    return cco


if __name__ == "__main__":
    main()
