"""BERT for sequence classification, as in Lightning's text classification tutorial: keyword batches, AdamW groups, a linear warm-up."""

import email.message
import json

import lightning as L
import torch
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, get_linear_schedule_with_warmup


def lines():
    """Lines of code of two modules of the standard library, and which one each is of."""
    for label, module in enumerate((json.decoder, email.message)):
        with open(module.__file__, encoding="utf-8") as file:
            yield from ((line.rstrip("\n"), label) for line in file if line.strip())


def collate(samples):
    texts, labels = zip(*samples, strict=True)
    width = min(32, max(len(text) for text in texts))
    ids = torch.tensor([[min(ord(c), 126) for c in text[:width].ljust(width, "\0")] for text in texts])
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": torch.tensor(labels)}


class LitBert(L.LightningModule):
    def __init__(self, learning_rate=2e-4, weight_decay=0.01, warmup_steps=2):
        super().__init__()
        self.save_hyperparameters()
        config = BertConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=2)
        self.model = BertForSequenceClassification(config)

    def forward(self, **inputs):
        return self.model(**inputs)

    def training_step(self, batch, batch_idx):
        outputs = self(**batch)
        self.log("train_loss", outputs[0])
        return outputs[0]

    def validation_step(self, batch, batch_idx):
        val_loss, logits = self(**batch)[:2]
        self.log("val_loss", val_loss)
        self.log("val_acc", (logits.argmax(1) == batch["labels"]).float().mean())

    def configure_optimizers(self):
        no_decay = ["bias", "LayerNorm.weight"]
        named = list(self.model.named_parameters())
        groups = [
            {"params": [p for n, p in named if not any(nd in n for nd in no_decay)], "weight_decay": self.hparams.weight_decay},
            {"params": [p for n, p in named if any(nd in n for nd in no_decay)], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.hparams.learning_rate)
        steps = self.trainer.estimated_stepping_batches
        scheduler = get_linear_schedule_with_warmup(optimizer, self.hparams.warmup_steps, steps)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def main(callbacks, **trainer_options):
    L.seed_everything(42)
    data = list(lines())
    train, val = DataLoader(data[::2], 16, shuffle=True, collate_fn=collate), DataLoader(data[1::2], 16, collate_fn=collate)
    trainer = L.Trainer(max_epochs=1, gradient_clip_val=1.0, accumulate_grad_batches=2, callbacks=callbacks, **trainer_options)
    trainer.fit(LitBert(), train, val)
    return trainer
