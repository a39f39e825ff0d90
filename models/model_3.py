from torch import nn

from .layers import Classifier, Deskew, P4MConv2d, P4MReadout


class Model_3(Classifier):
    """Advanced digit classifier, 4,506 parameters: deskewing, then filters in eight orientations.

    Only the convolutions with stride 1 are equivariant under rotations by 90 degrees and reflections;
    `Deskew`, the first convolution, batch normalization and the last layer are not.

    Takes images (N, 1, 28, 28), light ink on a dark background, of any real dtype and value range (see
    `Deskew`); returns logits, float32 (N, 10).
    Batch normalization: S. Ioffe, C. Szegedy, "Batch normalization", ICML 2015. Layer normalization:
    J. L. Ba et al., arXiv:1607.06450. Hardswish: A. Howard et al., "Searching for MobileNetV3", ICCV 2019.
    """

    def __init__(self):
        super().__init__(  # input: 1 x 28 x 28; comments: output and number of parameters
            Deskew(),  # 1 x 28 x 28
            P4MConv2d(1, 2, 5, stride=2, padding=2, orientations=1),  # 16 x 14 x 14; 50
            nn.BatchNorm2d(16),  # 32
            nn.Hardswish(),
            P4MConv2d(2, 2, 3, padding=1),  # 16 x 14 x 14; 288
            nn.MaxPool2d(2),  # 16 x 7 x 7; early: everything after it costs a quarter
            nn.BatchNorm2d(16),  # 32
            nn.Hardswish(),
            P4MConv2d(2, 4, 3, padding=1),  # 32 x 7 x 7; 576
            nn.BatchNorm2d(32),  # 64
            nn.Hardswish(),
            P4MConv2d(4, 4, 3, padding=1),  # 32 x 7 x 7; 1,152
            nn.BatchNorm2d(32),  # 64
            nn.Hardswish(),
            P4MConv2d(4, 4, 3, padding=1),  # 32 x 7 x 7; 1,152
            nn.BatchNorm2d(32),  # 64
            nn.Hardswish(),
            P4MReadout(4, 2, 7),  # 64 x 1 x 1; 392
            nn.Flatten(),  # 64
            nn.LayerNorm(64, elementwise_affine=False),
            nn.Hardswish(),
            nn.Dropout(0.1),  # keeps any digit from depending on a single feature
            nn.Linear(64, 10, bias=False),  # 640
        )
