"""Memory in use on this machine's NVIDIA GPUs, through NVML; machines without one have nothing to tell."""

from typing import Any

import pynvml


def memory_bytes(nvml: Any = None) -> float | None:
    """Bytes in use on all GPUs together, by whichever process; None without a GPU or its driver.

    The sum over devices, not over the service's processes: in a container NVML does not know those. What the service
    adds is the difference to what was in use before it started.
    """
    nvml = nvml or pynvml
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    try:
        devices = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        return sum(float(nvml.nvmlDeviceGetMemoryInfo(device).used) for device in devices) if devices else None
    except nvml.NVMLError:
        return None
    finally:
        nvml.nvmlShutdown()
