"""As in PyTorch's example for MNIST: the epoch is an argument, and results are kept in lists."""

import matplotlib.pyplot as plt
import torch
from torch.nn import functional as F

from config import Config
from data import make_loaders
from main import predict, test, train
from models import CustomResNet
from utils import get_device, seed_everything, summarize
from visualize import class_accuracy, plot_confusion_matrix, plot_misclassified

torch.manual_seed(1)
device = get_device()
# theirs: train_loader = get_train_loader(batch_size=64)
train_loader, _, test_loader = make_loaders(Config(batch_size=64), device)
model = CustomResNet().to(device)
# theirs: summary(model, (3, 32, 32))
summarize(model, (3, 32, 32))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=6, gamma=0.1)
train_losses, test_losses, train_acc, test_acc = [], [], [], []
for epoch in range(1, 3):
    # theirs: train(model, device, train_loader, optimizer, epoch, train_losses, train_acc)
    loss, accuracy = train(model, device, train_loader, optimizer, epoch)
    train_losses.append(loss)
    train_acc.append(100 * accuracy)
    # theirs: test(model, device, test_loader, test_losses, test_acc)
    loss, accuracy = test(model, device, test_loader)
    test_losses.append(loss)
    test_acc.append(100 * accuracy)
# theirs: plot_metrics(train_losses, train_acc, test_losses, test_acc)
# no counterpart: fit_model returns the history that plot_history draws
train(model, device, train_loader, optimizer, scheduler, epoch=3)
stats = test(model, device, test_loader, F.cross_entropy)
print(stats.loss, 100 * stats.accuracy)
# theirs: preds = get_all_preds(model, test_loader)
preds = predict(model, test_loader)
plot_misclassified(preds, n=10)
plt.show()
plot_confusion_matrix(preds.labels, preds.predicted, test_loader.dataset.classes)
# theirs: class_report(preds.labels, preds.predicted, test_loader.dataset.classes)
class_accuracy(preds.labels, preds.predicted, test_loader.dataset.classes)
