"""What is launched without Triton's search for it, and what is not."""

import pytest
import torch

launch = pytest.importorskip("vllm_flashprefill.kernels.launch")

X, Y = torch.zeros(2, 64).unbind()


class Compiled:
    def __init__(self, log):
        self.log = log

    def __getitem__(self, grid):
        return lambda *args: self.log.append((grid, *args))


class Kernel:
    """As Triton's, which gives what it has compiled."""

    arg_names = ("x_ptr", "n", "scale", "BLOCK", "FLAG")

    def __init__(self, compiles=True):
        self.searched, self.again, self.compiles = [], [], compiles

    def __getitem__(self, grid):
        def run(*args, **constants):
            self.searched.append((grid, args, constants))
            return Compiled(self.again) if self.compiles else None

        return run


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setattr(launch, "_known", {})
    return launch._known


def run(kernel, grid=(3,), x=X, n=5, scale=0.5, **constants):
    launch.launch_kernel(kernel, grid, x, n, scale, **{"BLOCK": 128, "FLAG": False, "num_warps": 4, **constants})


def test_tensors_alike_are_launched_at_once():
    kernel = Kernel()
    for x in (X, Y, X):
        run(kernel, x=x)
    assert kernel.searched == [((3,), (X, 5, 0.5), {"BLOCK": 128, "FLAG": False, "num_warps": 4})]
    assert [(grid, x.data_ptr(), *rest) for grid, x, *rest in kernel.again] == [
        ((3, 1, 1), x.data_ptr(), 5, 0.5, 128, False) for x in (Y, X)
    ]


@pytest.mark.parametrize(
    "other",
    [
        {"x": X[1:]}, {"x": X.to(torch.float16)}, {"x": None}, {"n": 16}, {"n": 1}, {"scale": 0.25},
        {"BLOCK": 64}, {"FLAG": True}, {"num_warps": 8}, {"grid": (4,)}, {"grid": (3, 2)},
    ],
    ids=str,
)  # fmt: skip
def test_what_a_kernel_may_be_compiled_for_is_left_to_triton(other):
    kernel = Kernel()
    launch.launch_kernel(kernel, (3,), X, X, 5, BLOCK=128, FLAG=False) if "x" in other else run(kernel)
    before = len(kernel.searched)
    if "x" in other:
        launch.launch_kernel(kernel, (3,), X, other["x"], 5, BLOCK=128, FLAG=False)
    else:
        run(kernel, **other)
    assert len(kernel.searched) == before + 1 and not kernel.again


def test_kernels_of_one_shape_are_told_apart():
    kernels = Kernel(), Kernel()
    for kernel in kernels * 2:
        run(kernel)
    assert all(len(kernel.searched) == len(kernel.again) == 1 for kernel in kernels)


def test_nothing_is_kept_where_nothing_is_compiled(known):
    kernel = Kernel(compiles=False)
    for _ in range(2):
        run(kernel)
    assert len(kernel.searched) == 2 and not known


def test_steps_with_numbers_of_their_own_are_forgotten(known):
    kernel = Kernel()
    for n in range(3 * launch._MOST_KNOWN):
        run(kernel, n=n)
    assert 0 < len(known) <= launch._MOST_KNOWN


def test_descriptors_of_tensors_alike_are_one_kind():
    descriptors = pytest.importorskip("vllm_flashprefill.kernels.descriptors")
    if descriptors.TensorDescriptor is None:
        pytest.skip("this Triton has no tensor descriptors")
    tensors = torch.zeros(3, 8, 16, 2, 64, dtype=torch.bfloat16).unbind()
    matrix = descriptors.as_matrix(tensors[0])
    made = [descriptors.descriptor(x, matrix, (16, 64)) for x in tensors[:2]]
    other = descriptors.descriptor(tensors[2], matrix, (8, 64))
    assert made[0].kind == made[1].kind != other.kind
    assert [x.base.data_ptr() for x in made] == [x.data_ptr() for x in tensors[:2]]
    expected = descriptors.TensorDescriptor(tensors[0], list(matrix.shape), list(matrix.strides), [16, 64])
    assert (made[0].shape, made[0].strides, made[0].block_shape) == (
        expected.shape, expected.strides, expected.block_shape
    )  # fmt: skip
