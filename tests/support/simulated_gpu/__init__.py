"""A GPU that is not there: torch.cuda on top of the CPU, so that what only runs on a GPU runs in a test.

Its tensors say that they are on "cuda" and keep their numbers in a CPU tensor that nobody else can reach. It is as
strict as a real one where a program's mistakes would show only there:

* an operation on tensors of both devices fails, and so does a kernel that is launched with a tensor of the host;
* a copy that is only queued has not happened yet: what it writes on the host is wrong until an event after it, or the
  device, was waited for, and the host memory that it reads must stay as it is until then;
* a graph captures operations, and repeats them on the memory that they used then. While it is captured, nothing may
  wait for the device or copy from the host. What a graph returns is wrong until it is replayed, and again as soon as
  another graph of its pool is;
* memory is counted, and runs out.

Time and order are not simulated: all work is done at once, on one stream, and what a graph allocates is not counted.
Triton's kernels run in its interpreter.
"""

from tests.support.simulated_gpu.device import SimulatedGpu
from tests.support.simulated_gpu.torch_cuda import simulated_gpu

__all__ = ["SimulatedGpu", "simulated_gpu"]
