"""Own loops over epochs, with the criterion as the fifth argument."""

import torch.optim as optim
from torch import nn

from config import Config
from data import make_loaders
from main import find_lr, predict, test, train
from models import CustomResNet
from utils import get_device, seed_everything, summarize
from visualize import (
    class_accuracy,
    plot_class_accuracy,
    plot_confusion_matrix,
    plot_gradcam,
    plot_lr_finder,
    plot_misclassified,
    plot_samples,
)

EPOCHS = 2
# theirs: set_seed(1)
seed_everything(1)
device = get_device()
# theirs: train_loader, test_loader = get_loaders(train_transforms, test_transforms, batch_size=512)
train_loader, _, test_loader = make_loaders(Config(batch_size=512), device)
classes = train_loader.dataset.classes
# theirs: show_sample_images(train_loader, classes)
plot_samples(train_loader, classes)
model = CustomResNet().to(device)
# theirs: model_summary(model, (3, 32, 32))
summarize(model, (3, 32, 32))
criterion = nn.CrossEntropyLoss()
optimizer = optim.Adam(model.parameters(), lr=1e-3)
finder = find_lr(model, optimizer, criterion, device, train_loader, num_iter=30, end_lr=1.0)
# theirs: finder.plot()
plot_lr_finder(finder)
steps = len(train_loader)
scheduler = optim.lr_scheduler.OneCycleLR(optimizer, 0.01, epochs=EPOCHS, steps_per_epoch=steps)
for _ in range(EPOCHS - 1):
    train_loss, train_accuracy = train(model, device, train_loader, optimizer, criterion, scheduler)
    test_loss, test_accuracy = test(model, device, test_loader, criterion)
# theirs: misclassified = get_misclassified(model, device, test_loader)
misclassified = predict(model, device, test_loader)
plot_misclassified(misclassified, classes, 20)
# theirs: show_gradcam(model, misclassified, classes, target_layers=[model.layer2[-1]])
plot_gradcam(model, misclassified, classes, target_layers=[model.layer2[-1]])
plot_confusion_matrix(model, device, test_loader, classes)
class_accuracy(model, device, test_loader, classes)
# theirs: plot_per_class_accuracy(model, device, test_loader, classes)
plot_class_accuracy(model, device, test_loader, classes)
