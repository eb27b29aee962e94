"""Everything imported with a star, one module after the other."""

import torch
from torch import nn

from data import *
from models import *
from main import *
from visualize import *
from transforms import *
from utils import *
from config import Config

seed_everything(5)
device = get_device()
# theirs: train_loader, test_loader = get_dataset(batch_size=128)
train_loader, validation, test_loader = make_loaders(Config(batch_size=128), device)
# theirs: mean, std = get_mean_std(train_loader.dataset.data)
mean, std = statistics(train_loader.dataset.data)
# theirs: show(train_loader)
plot_samples(train_loader)
model = CustomResNet().to(device)
# theirs: torchsummary(model, (3, 32, 32))
summarize(model, (3, 32, 32))
optimizer = torch.optim.Adam(model.parameters())
# theirs: lr = find_lr(model, device, train_loader, optimizer, nn.CrossEntropyLoss(), num_iter=30, end_lr=1)
lr = find_lr(
    model, device, train_loader, optimizer, nn.CrossEntropyLoss(), num_iter=30, end_lr=1
).suggestions["minimum"]
# theirs: scheduler = one_cycle_lr(optimizer, lr, epochs=1, steps_per_epoch=len(train_loader))
scheduler = one_cycle(optimizer, lr, epochs=1, steps_per_epoch=len(train_loader))
history = fit_model(
    model, device, train_loader, test_loader, optimizer, scheduler, nn.CrossEntropyLoss(), 1
)
plot_history(history)
history.save("runs/mine")
predictions = predict(model, device, test_loader)
plot_misclassified(predictions)
plot_confusion_matrix(predictions)
# theirs: gradcam_misclassified(model, predictions, layer="layer2")
plot_gradcam(model, predictions, layer="layer2")
