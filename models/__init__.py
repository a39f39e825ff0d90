from .model_1 import Model_1
from .model_2 import Model_2
from .model_3 import Model_3

MODELS = {"Model_1": Model_1, "Model_2": Model_2, "Model_3": Model_3}
