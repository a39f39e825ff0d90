from torch import nn

from .layers import Classifier, Deskew


class Model_2(Classifier):
    """Intermediate digit classifier, 15,106 parameters: Model_1 with fewer channels, deskewing and dropout.

    Takes images (N, 1, 28, 28), light ink on a dark background, of any real dtype and value range (see
    `Deskew`); returns logits, float32 (N, 10).
    Dropout: N. Srivastava et al., "Dropout: a simple way to prevent neural networks from
    overfitting", JMLR 15, 2014.
    """

    def __init__(self):
        super().__init__(  # input: 1 x 28 x 28; comments: output and number of parameters
            Deskew(),  # 1 x 28 x 28
            nn.Conv2d(1, 6, 3, padding=1),  # 6 x 28 x 28; 60
            nn.MaxPool2d(2),  # 6 x 14 x 14
            nn.ReLU(inplace=True),
            nn.Conv2d(6, 12, 3, padding=1),  # 12 x 14 x 14; 660
            nn.MaxPool2d(2),  # 12 x 7 x 7
            nn.ReLU(inplace=True),
            nn.Flatten(),  # 588
            nn.Dropout(0.2),  # before the layer with most of the parameters
            nn.Linear(588, 24),  # 24; 14,136
            nn.ReLU(inplace=True),
            nn.Linear(24, 10),  # 10; 250
        )
