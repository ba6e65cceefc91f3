"""`use_backend` and `backend_report` in several threads."""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fastvit
from fastvit import ops


class Gate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return ops.swiglu(x)


def asked() -> str:
    """The setting that an op finds in this thread."""
    x = torch.randn(3, 32, dtype=torch.float64)  # which no kernel takes
    try:
        (choice,) = fastvit.backend_report(Gate(), x).choices
    except RuntimeError as error:
        assert "backend 'triton' was asked for" in str(error)
        return "triton"
    return "reference" if "'reference' was asked" in choice.reason else "auto"


def in_thread(*runs: Callable[[], Any]) -> list[Any]:
    """Call all functions at once, each in its own thread, and return their results."""
    found: list[Any] = [None] * len(runs)

    def run(i: int) -> None:
        found[i] = runs[i]()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(runs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return found


def overlapping() -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Two functions whose `use_backend` blocks overlap: the first begins first and ends first."""
    inside, both, out = (threading.Event() for _ in range(3))

    def first() -> list[str]:
        with fastvit.use_backend("reference"):
            inside.set()
            assert both.wait(60)
            found = [asked()]
        out.set()
        return [*found, asked()]

    def second() -> list[str]:
        assert inside.wait(60)
        found = [asked()]
        with fastvit.use_backend("triton"):
            both.set()
            assert out.wait(60)
            found.append(asked())
        return [*found, asked()]

    return first, second


def test_settings_of_two_threads_overlap() -> None:
    before = asked()
    found = in_thread(*overlapping())
    assert found == [["reference", before], [before, "triton", before]]
    assert asked() == before == in_thread(asked)[0]


def test_a_thread_beside_the_main_one() -> None:
    before = asked()
    first, second = overlapping()
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(first()))
    thread.start()
    mine = second()
    thread.join(60)
    assert mine == [before, "triton", before]
    assert found[0][0] == "reference"
    assert asked() == before


def test_threads_that_set_nothing_follow_the_main_one() -> None:
    """So do autograd's, and those of DataParallel."""
    with fastvit.use_backend("reference"):
        assert in_thread(asked) == ["reference"]
        report = fastvit.backend_report(Gate(), torch.randn(2, 8))
    assert len(report.choices) == 1


def test_reports_of_two_threads_overlap() -> None:
    inside, both, out = (threading.Event() for _ in range(3))

    class First(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            inside.set()
            assert both.wait(60)
            y = ops.swiglu(x)
            out.set()
            return y

    class Second(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert inside.wait(60)
            both.set()
            assert out.wait(60)
            return ops.swiglu(ops.swiglu(x))

    x = torch.randn(2, 16)
    runs = [lambda m=m: fastvit.backend_report(m, x) for m in (First(), Second())]
    assert [len(report.choices) for report in in_thread(*runs)] == [1, 2]


def test_compiled_code_follows_the_thread(device: torch.device) -> None:
    torch._dynamo.reset()
    x, ran = torch.randn(3, 32, device=device), []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Callable:
        kernels = any("fastvit" in str(node.target) for node in graph.graph.nodes)

        def run(*args: Any) -> Any:
            ran.append("triton" if kernels else "reference")
            return graph.forward(*args)

        return run

    compiled: Any = torch.compile(Gate(), backend=keep, fullgraph=True)

    def under(name: str) -> Tensor:
        with fastvit.use_backend(name):
            return compiled(x)

    order = ["triton", "reference", "triton"]
    for name in order:
        (got,) = in_thread(lambda name=name: under(name))
        torch.testing.assert_close(got, Gate()(x))
    assert ran == order
    report = fastvit.backend_report(compiled, x)
    assert report.choices == fastvit.backend_report(Gate(), x).choices


def test_a_setting_inside_compiled_code() -> None:
    def run(x: Tensor) -> Tensor:
        with fastvit.use_backend("reference"):
            return ops.swiglu(x)

    x = torch.randn(3, 32)
    torch.testing.assert_close(torch.compile(run, backend="eager", fullgraph=True)(x), run(x))
