"""Losses of many kinds, and networks that end in log_softmax."""

import torch
from torch import nn
from torch.nn import functional as F

from config import Config
from data import make_loaders
from main import find_lr, fit_model, predict, test, train
from models import CustomResNet
from utils import get_device, seed_everything
from visualize import plot_class_accuracy, plot_history, plot_misclassified


class Logarithms(nn.Module):
    """A network that ends in log_softmax."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return F.log_softmax(self.network(x), dim=1)


class FocalLoss(nn.Module):
    """Counts what is learned already for less."""

    def forward(self, logits, labels):
        loss = F.cross_entropy(logits, labels, reduction="none")
        return ((1 - torch.exp(-loss)) ** 2 * loss).mean()


seed_everything(11)
device = get_device()
# theirs: train_loader, test_loader = build_loaders(batch_size=256)
train_loader, _, test_loader = make_loaders(Config(batch_size=256), device)
model = CustomResNet().to(device)
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
weights = torch.tensor([1.0, 1, 1, 2, 1, 2, 1, 1, 1, 1])
train(model, device, train_loader, optimizer, nn.CrossEntropyLoss(weight=weights))
train(model, device, train_loader, optimizer, nn.CrossEntropyLoss(label_smoothing=0.1), None)
train(model, device, train_loader, optimizer, F.cross_entropy)
train(model, device, train_loader, optimizer, FocalLoss())
test(model, device, test_loader, nn.CrossEntropyLoss(reduction="sum"))
nll = Logarithms(CustomResNet()).to(device)
second = torch.optim.Adam(nll.parameters(), lr=0.01)
train(nll, device, train_loader, second, F.nll_loss)
test(nll, device, test_loader, nn.NLLLoss())
third = torch.optim.SGD(nll.parameters(), lr=0.01)
find_lr(nll, device, train_loader, third, nn.NLLLoss(), start_lr=1e-4, end_lr=5.0, num_iter=30)
history = fit_model(model, device, train_loader, test_loader, optimizer, loss_fn=FocalLoss(), n_epochs=1)
# theirs: draw_history(history)
plot_history(history)
plot_misclassified(model, test_loader)
predictions = predict(nll, test_loader)
# theirs: plot_accuracy_by_class(predictions)
plot_class_accuracy(predictions)
