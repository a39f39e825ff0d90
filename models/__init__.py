from .model_1 import Model_1 as Model_1
from .model_2 import Model_2 as Model_2
from .model_3 import Model_3 as Model_3
