"""A time-series forecast with an LSTM: windows over a series, a state handed on, ReduceLROnPlateau."""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset


class Windows(Dataset):
    def __init__(self, series, width=24):
        self.series, self.width = series, width

    def __len__(self):
        return len(self.series) - self.width

    def __getitem__(self, i):
        return self.series[i : i + self.width, None], self.series[i + self.width, None]


class LSTMRegressor(L.LightningModule):
    def __init__(self, hidden_size=32, num_layers=2, dropout=0.2):
        super().__init__()
        self.save_hyperparameters()
        self.lstm = nn.LSTM(1, hidden_size, num_layers, dropout=dropout, batch_first=True)
        self.linear = nn.Linear(hidden_size, 1)

    def forward(self, x):
        lstm_out, _ = self.lstm(x)
        return self.linear(lstm_out[:, -1])

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.mse_loss(self(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", nn.functional.mse_loss(self(x), y))

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), 1e-2)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer), "monitor": "val_loss"},
        }


def main(callbacks, **trainer_options):
    L.seed_everything(42)
    t = torch.arange(600) / 10
    series = torch.sin(t) + 0.5 * torch.sin(3.1 * t) + 0.05 * torch.randn(600)
    train, val = Windows(series[:500]), Windows(series[476:])
    trainer = L.Trainer(max_epochs=2, callbacks=callbacks, **trainer_options)
    trainer.fit(LSTMRegressor(), DataLoader(train, 32, shuffle=True), DataLoader(val, 32))
    return trainer
