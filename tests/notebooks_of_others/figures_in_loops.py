"""Figures in mid-cell and in loops, each with plt.show(), one for each layer and class."""

import matplotlib.pyplot as plt
import torch
from torch import nn

from config import Config
from data import make_loaders
from main import fit_model, predict
from models import CustomResNet
from utils import get_device, seed_everything
from visualize import (
    cam_layers,
    plot_class_accuracy,
    plot_confusion_matrix,
    plot_gradcam,
    plot_history,
    plot_lr_history,
    plot_misclassified,
    plot_samples,
    save_figure,
)

seed_everything(7)
device = get_device()
# theirs: loaders = data_setup.create(batch_size=512)
loaders = make_loaders(Config(batch_size=512), device)
for loader in (loaders.train, loaders.test):
    # theirs: show_batch(loader)
    plot_samples(loader)
    plt.show()
model = CustomResNet().to(device)
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
histories = {}
for smoothing in (0.0, 0.1):
    criterion = nn.CrossEntropyLoss(label_smoothing=smoothing)
    # theirs: histories[str(smoothing)] = train_model(model, device, loaders.train, loaders.test, optimizer, criterion, num_epochs=1)
    histories[str(smoothing)] = fit_model(
        model, device, loaders.train, loaders.test, optimizer, criterion, num_epochs=1
    )
# theirs: plot_all(histories)
plot_history(histories)
plt.show()
for history in histories.values():
    # theirs: plot_lr_schedule(history)
    plot_lr_history(history)
    plt.show()
# theirs: predictions = run_inference(model, loaders.test)
predictions = predict(model, loaders.test)
figure = plot_misclassified(predictions, loaders.classes)
figure.savefig("misclassified.png")
plt.show()
for layer in list(cam_layers(model))[1:]:
    figure = plot_gradcam(model, predictions, loaders.classes, layer)
    figure.savefig(f"{layer}.png")
    plt.show()
# theirs: save(plot_confusion_matrix(predictions, loaders.classes), "matrix.png")
save_figure(plot_confusion_matrix(predictions, loaders.classes), "matrix.png")
# theirs: class_bars(predictions, loaders.classes)
plot_class_accuracy(predictions, loaders.classes)
plt.show()
