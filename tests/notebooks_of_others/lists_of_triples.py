"""Mistakes collected as (image, label, prediction) in a loop of one's own, and shown from the list."""

import torch
from torch import nn
from torchvision.transforms import v2

from config import Config
from data import make_loaders
from main import test, train
from models import ResNet18
from utils import get_device, seed_everything, summarize
from visualize import plot_gradcam, plot_gradcam_layers, plot_misclassified, plot_samples

seed_everything(1)
device = get_device()
# theirs: train_loader, test_loader = get_loader(train_transforms, test_transforms, 512)
train_loader, _, test_loader = make_loaders(Config(batch_size=512), device)
classes = test_loader.dataset.classes
# theirs: display_data_samples(train_loader.dataset, 20, classes)
plot_samples(train_loader.dataset, 20, classes)
model = ResNet18().to(device)
# theirs: get_summary(model, (1, 3, 32, 32))
summarize(model, (1, 3, 32, 32))
criterion = nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
train(model, device, train_loader, optimizer, criterion)
test(model, device, test_loader, criterion)

misclassified_data = []
model.eval()
with torch.no_grad():
    for images, labels in test_loader:
        answers = model(images.to(device)).argmax(dim=1, keepdim=True)
        for image, label, answer in zip(images, labels, answers, strict=True):
            if label != answer:
                misclassified_data.append((image, label, answer))
inv_normalize = v2.Normalize(
    mean=[-0.4914 / 0.2470, -0.4822 / 0.2435, -0.4465 / 0.2616], std=[1 / 0.2470, 1 / 0.2435, 1 / 0.2616]
)
# theirs: display_misclassified_data(misclassified_data, classes, inv_normalize, number_of_samples=10)
plot_misclassified(misclassified_data, classes, inv_normalize, number_of_samples=10)
target_layers = [model.layer3[-1]]
targets = None
# theirs: display_gradcam_output(misclassified_data, classes, inv_normalize, model, target_layers, targets)
plot_gradcam(misclassified_data, classes, inv_normalize, model, target_layers, targets)
# theirs: display_gradcam_output(misclassified_data, classes, inv_normalize, model, [model.layer2[-1]], targets, number_of_samples=6, transparency=0.7)
plot_gradcam(
    misclassified_data, classes, inv_normalize, model, [model.layer2[-1]], targets, number_of_samples=6
)
# theirs: compare_layers(misclassified_data, classes, inv_normalize, model, number_of_samples=3)
plot_gradcam_layers(misclassified_data, classes, inv_normalize, model, number_of_samples=3)
