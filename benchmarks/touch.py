"""Run every op once, forward and backward, on odd shapes, for compute-sanitizer to check."""

import clone  # noqa: F401
import torch

from benchmarks import bench_attention, gpu_steps, harness


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for module in gpu_steps.OPS:
        shapes = [("odd", 3, 192)]
        if module is bench_attention:
            shapes = [(2, 17, 3, 64), (1, 197, 2, 80), (1, 333, 2, 64)]
        for shape in shapes:
            case = module.case(device, *shape, dtype, True)
            call = case.providers[0].call
            assert call is not None
            harness._caller(case, call, case.inputs(device, dtype))()
            harness.synchronize(device)
            print(case.key, flush=True)


if __name__ == "__main__":
    main()
