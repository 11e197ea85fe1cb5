"""The autoencoder of Lightning's "in 15 minutes": the step calls encoder and decoder, forward is the encoder."""

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn, optim, utils

encoder = nn.Sequential(nn.Linear(8 * 8, 64), nn.ReLU(), nn.Linear(64, 3))
decoder = nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 8 * 8))


class LitAutoEncoder(L.LightningModule):
    def __init__(self, encoder, decoder):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def training_step(self, batch, batch_idx):
        x, _ = batch
        x = x.view(x.size(0), -1)
        z = self.encoder(x)
        x_hat = self.decoder(z)
        loss = nn.functional.mse_loss(x_hat, x)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return optim.Adam(self.parameters(), lr=1e-3)


def main(callbacks, **trainer_options):
    images, labels = load_digits(return_X_y=True)
    dataset = utils.data.TensorDataset(torch.tensor(images / 16, dtype=torch.float32).view(-1, 8, 8), torch.tensor(labels))
    autoencoder = LitAutoEncoder(encoder, decoder)
    trainer = L.Trainer(max_epochs=1, callbacks=callbacks, **trainer_options)
    trainer.fit(model=autoencoder, train_dataloaders=utils.data.DataLoader(dataset, batch_size=64))
    # use the model after training, as the page does
    autoencoder.encoder.eval()
    embeddings = autoencoder.encoder(torch.rand(4, 8 * 8))
    assert embeddings.shape == (4, 3)
    return trainer
