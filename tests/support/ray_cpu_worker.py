import torch
from vllm.v1.worker.cpu_worker import CPUWorker


class RayCpuWorker(CPUWorker):
    """One that has a device, as vLLM's first Ray executor asks."""

    def init_device(self):
        super().init_device()
        self.device = torch.device("cpu")
