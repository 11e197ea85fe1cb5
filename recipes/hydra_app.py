"""A Hydra application: everything is configured, the compression by one group.

Run: ``python recipes/hydra_app.py cco@callbacks.cco.cfg=w4a8 trainer.max_epochs=2``

Your own application takes the shipped recipes with ``hydra.searchpath: [pkg://lightning_cco.configs]`` in its config.
"""

from __future__ import annotations

import hydra
import lightning.pytorch as pl
from digits_cnn import quiet
from omegaconf import DictConfig

from lightning_cco import shipped_configs_dir


def train(config: DictConfig) -> dict[str, float]:
    """Fit, then test the best checkpoint with the same Trainer."""
    quiet()
    pl.seed_everything(config.seed)
    model = hydra.utils.instantiate(config.model)
    data = hydra.utils.instantiate(config.data)
    callbacks = [hydra.utils.instantiate(callback) for callback in config.callbacks.values()]
    trainer = hydra.utils.instantiate(config.trainer, callbacks=callbacks)
    trainer.fit(model, data)
    metrics = trainer.callback_metrics
    if config.test:
        trainer.test(model, data, ckpt_path="best")
        metrics = {**metrics, **trainer.callback_metrics}
    return {name: float(value) for name, value in metrics.items()}


@hydra.main(version_base="1.3", config_path=str(shipped_configs_dir()), config_name="train")
def main(config: DictConfig) -> None:
    train(config)


if __name__ == "__main__":
    main()
