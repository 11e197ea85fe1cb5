"""The same by LightningCLI: no line of training code.

Run: ``python recipes/lightning_cli.py fit --trainer.callbacks+=lightning_cco.CCOCallback --trainer.callbacks.cfg=w8a8 --trainer.max_epochs=2``
"""

from __future__ import annotations

from digits import DigitsData, DigitsModule
from lightning.pytorch.cli import LightningCLI


def main(args: list[str] | None = None) -> LightningCLI:
    return LightningCLI(DigitsModule, DigitsData, args=args, seed_everything_default=1, save_config_callback=None)


if __name__ == "__main__":
    main()
