"""The criterion before the optimizer, the scheduler last, and a loop that has a name of its own."""

import matplotlib.pyplot as plt
import torch
from torch import nn

from config import Config
from data import make_loaders
from main import fit_model, one_cycle, predict, test, train
from models import ResNet18
from utils import get_device, seed_everything, summarize
from visualize import (
    class_counts,
    plot_augmentations,
    plot_confusion_matrix,
    plot_gradcam,
    plot_history,
    plot_lr_history,
    plot_misclassified,
    plot_samples,
)

seed_everything(42)
device = get_device()
# theirs: train_loader, test_loader = get_data_loaders(batch_size=128, augment=True)
train_loader, _, test_loader = make_loaders(Config(batch_size=128), device)
print(len(train_loader.dataset), len(test_loader.dataset))
# theirs: class_distribution(train_loader)
class_counts(train_loader)
# theirs: preview_augmentations(train_loader)
plot_augmentations(train_loader)
# theirs: plot_images(train_loader, num_images=10)
plot_samples(train_loader, num_images=10)
plt.show()
net = ResNet18().to(device)
# theirs: print_summary(net)
summarize(net)
criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
# theirs: scheduler = get_one_cycle(optimizer, 0.1, epochs=1, steps_per_epoch=len(train_loader))
scheduler = one_cycle(optimizer, 0.1, epochs=1, steps_per_epoch=len(train_loader))
# theirs: history = run_training(net, device, train_loader, test_loader, criterion, optimizer, scheduler, 1)
history = fit_model(net, device, train_loader, test_loader, criterion, optimizer, scheduler, 1)
# theirs: train_one_epoch(net, device, train_loader, criterion, optimizer)
train(net, device, train_loader, criterion, optimizer)
# theirs: evaluate(net, device, test_loader, criterion)
test(net, device, test_loader, criterion)
plot_history(history)
plt.show()
# theirs: plot_lr(history)
plot_lr_history(history)
# theirs: predictions = get_predictions(net, test_loader, device)
predictions = predict(net, test_loader, device)
plot_misclassified(predictions, number_of_samples=10)
plt.show()
# theirs: display_gradcam(net, predictions, target_layers=[net.layer3[-1]], number_of_samples=4)
plot_gradcam(net, predictions, target_layers=[net.layer3[-1]], number_of_samples=4)
plt.show()
plot_confusion_matrix(predictions, train_loader.dataset.classes)
