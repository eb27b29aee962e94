"""One call that does it all, with NUM_EPOCHS and everything else by keyword."""

import torch
from torch import nn

from config import Config
from data import make_loaders
from main import find_lr, fit_model, make_optimizer, predict, test
from models import CustomResNet, make_model
from utils import get_device, seed_everything, summarize
from visualize import (
    class_accuracy,
    plot_confusion_matrix,
    plot_gradcam,
    plot_gradcam_layers,
    plot_history,
    plot_misclassified,
    plot_samples_by_class,
)

NUM_EPOCHS = 1
seed_everything(seed=0)
device = get_device()
# theirs: train_loader, test_loader, classes = create_dataloaders(batch_size=256, num_workers=2)
loaders = make_loaders(Config(batch_size=256), device)
train_loader, test_loader, classes = loaders.train, loaders.test, loaders.test.dataset.classes
# theirs: show_class_samples(train_loader, class_names=classes)
plot_samples_by_class(train_loader, class_names=classes)
model = CustomResNet(num_classes=10).to(device)
# theirs: other = get_model("ResNet18", num_classes=10)
other = make_model("ResNet18", num_classes=10)
# theirs: summary(model, input_size=(3, 32, 32))
summarize(model, (3, 32, 32))
# theirs: optimizer = get_optimizer("adam", model, lr=0.01, weight_decay=1e-4)
optimizer = make_optimizer("adam", model, lr=0.01, weight_decay=1e-4)
# theirs: max_lr = find_lr(model=model, train_loader=train_loader, optimizer=optimizer, device=device)
max_lr = find_lr(
    model=model, train_loader=train_loader, optimizer=optimizer, device=device, steps=30
).suggestions["valley"]
steps = len(train_loader)
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, epochs=1, steps_per_epoch=steps)
history = fit_model(
    model=model,
    device=device,
    train_loader=train_loader,
    test_loader=test_loader,
    optimizer=optimizer,
    criterion=nn.CrossEntropyLoss(),
    scheduler=scheduler,
    NUM_EPOCHS=NUM_EPOCHS,
)
# theirs: plot_curves(history)
plot_history(history)
# theirs: test_loss, test_acc = evaluate_model(model=model, test_loader=test_loader, device=device)
test_loss, test_acc = test(model=model, test_loader=test_loader, device=device)
# theirs: results = collect_predictions(model=model, loader=test_loader, device=device)
results = predict(model=model, loader=test_loader, device=device)
plot_misclassified(results, class_names=classes, num_images=20)
# theirs: visualize_gradcam(model, results, class_names=classes, target_layer=model.layer2, num_images=4)
plot_gradcam(model, results, class_names=classes, target_layer=model.layer2, num_images=4)
# theirs: gradcam_all_layers(model, results)
plot_gradcam_layers(model, results)
plot_confusion_matrix(results, class_names=classes)
# theirs: accuracy_per_class(results, class_names=classes)
class_accuracy(results, class_names=classes)
