from torch import nn

from .layers import Classifier


class Model_1(Classifier):
    """Baseline digit classifier, 26,698 parameters: two convolutions, two fully connected layers.

    Takes images, float32 (N, 1, 28, 28), normalized with `datafile.normalize`; returns logits, float32
    (N, 10).
    A LeNet-like net; after Y. LeCun et al., "Gradient-based learning applied to document
    recognition", Proceedings of the IEEE 86(11), 1998.
    """

    def __init__(self):
        super().__init__(  # input: 1 x 28 x 28; comments: output and number of parameters
            nn.Conv2d(1, 8, 3, padding=1),  # 8 x 28 x 28; 80
            nn.MaxPool2d(2),  # 8 x 14 x 14
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 16, 3, padding=1),  # 16 x 14 x 14; 1,168
            nn.MaxPool2d(2),  # 16 x 7 x 7
            nn.ReLU(inplace=True),
            nn.Flatten(),  # 784
            nn.Linear(784, 32),  # 32; 25,120
            nn.ReLU(inplace=True),
            nn.Linear(32, 10),  # 10; 330
        )
