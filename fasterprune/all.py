from .schedules import *
from .criteria import *
from .granularity import *
from .contexts import *
from .layers import *
from .sparsifier import *
from .callback import *
from .channels import *
