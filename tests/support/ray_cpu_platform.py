"""vLLM's CPU, as a platform that its Ray executors take; a plugin of the processes of `ray_cpu`."""

from vllm.platforms.cpu import CpuPlatform


def platform():
    return f"{__name__}.RayCpuPlatform"


class RayCpuPlatform(CpuPlatform):
    ray_device_key = "GPU"

    @classmethod
    def check_and_update_config(cls, vllm_config):
        # Some versions replace Ray, which they cannot use here, by processes of this machine.
        chosen = vllm_config.parallel_config.distributed_executor_backend
        super().check_and_update_config(vllm_config)
        vllm_config.parallel_config.distributed_executor_backend = chosen
        if chosen == "ray":
            vllm_config.parallel_config.worker_cls = "tests.support.ray_cpu_worker.RayCpuWorker"

    @classmethod
    def set_device(cls, device):
        pass

    @classmethod
    def device_control_id_to_physical_device_id(cls, device_id):
        return int(device_id)
