"""Which backend serves a call: by default, by name, by environment; and what importing imports."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import cases
import pytest
import torch
from cases import F64, draw

from selfnpo_kernels import affine_noise, backends, cpp, normal

KERNELS = Path(backends.__file__).parents[1]
BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name in {names}:
            raise ImportError(f"{{name}} is not there")
sys.meta_path.insert(0, Block())
"""
ONE_CALL = """
import torch
from selfnpo_kernels import affine_noise, backends
x = torch.ones(2, 3)
print(affine_noise(x, torch.ones(1, 2), x).sum().item(), backends.backend_of("cpu"))
"""


# Runs the code of each line in a fork of a process that has imported torch and nothing of ours:
# importing torch takes longer than all that the tests ask of such a process.
FORKS = """
import json, os, sys, traceback
import torch
for line in sys.stdin:
    code, environment, folder = json.loads(line)
    if os.fork():
        print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
        continue
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environment)
    status = 0
    try:
        exec(code, {"__name__": "__main__"})
    except SystemExit as asked:
        status = asked.code
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
"""


@functools.cache
def forks() -> subprocess.Popen:
    """The process that forks; it ends with this one, which closes its standard input."""
    environment = os.environ | {"PYTHONPATH": str(KERNELS)}
    return subprocess.Popen(
        [sys.executable, "-c", FORKS], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def child(code: str, *, without: tuple[str, ...] = (), fresh: bool = False, **environment: str):
    """Run code in a process of its own, in which some modules cannot be imported.

    The process has imported torch, except if `fresh`.
    """
    names = ("SELFNPO_BACKEND", "SELFNPO_REQUIRE_CPP", "TRITON_INTERPRET", "ATEN_CPU_CAPABILITY")
    clean = {k: v for k, v in os.environ.items() if k not in names} | environment
    clean["PYTHONPATH"] = str(KERNELS)
    code = (BLOCK.format(names=without) if without else "") + code
    if fresh:
        return subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True, check=False)
    with tempfile.TemporaryDirectory() as folder:
        server = forks()
        server.stdin.write(json.dumps([code, clean, folder]) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        out, err = (Path(folder, name).read_text() for name in ("out", "err"))
    return subprocess.CompletedProcess([sys.executable, "-c", code], status, out, err)


def stdout(done: subprocess.CompletedProcess) -> str:
    """The standard output of a process that must have succeeded."""
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def failure(done: subprocess.CompletedProcess) -> str:
    """The last line of a traceback."""
    assert done.returncode != 0, done.stdout
    return done.stderr.strip().splitlines()[-1]


def test_every_backend_is_there():
    """A backend that was not built is no reason to skip its tests."""
    for name in backends.NAMES:
        there, why = backends.available(name)
        assert there, f"{name}: {why}"
        assert why


def test_cpu_tensors_go_to_cpp_and_float64_to_the_reference():
    assert backends.backend_of("cpu") == "cpp"
    assert backends.backend_of("cpu", float64=True) == "reference"
    assert backends.backend_of("mps") == "reference"


def test_use_forces_a_backend_and_leaves_no_trace(monkeypatch):
    served = []
    implementation = backends.implementation

    def watched(op, arguments):
        function = implementation(op, arguments)
        served.append((op, getattr(function, "__module__", "")))
        return function

    monkeypatch.setattr(backends, "implementation", watched)
    for name, module in (("reference", "selfnpo_kernels.reference"), ("cpp", "selfnpo_cpp"), ("triton", "triton")):
        on = cases.device(name)
        x, k = draw(1, (2, 3), (1, 2), on=on)
        with backends.use(name):
            assert backends.backend_of(x.device.type) == name
            with backends.use("reference"):
                assert backends.backend_of(x.device.type) == "reference"
            assert backends.backend_of(x.device.type) == name
            affine_noise(x, k, x)
            assert module in served[-1][1]
    assert backends.backend_of("cpu") == "cpp"
    with pytest.raises(ZeroDivisionError), backends.use("reference"):
        raise ZeroDivisionError
    assert backends.backend_of("cpu") == "cpp"


def test_a_backend_that_is_not_one_is_refused():
    with pytest.raises(backends.BackendError, match="'cudnn' is no backend; expected one of reference, cpp, triton"):
        with backends.use("cudnn"):
            pass


@pytest.mark.parametrize("name", ["cpp", "triton"])
def test_a_forced_backend_refuses_float64(name):
    on = cases.device(name)
    x, k = draw(2, (2, 3), (1, 2), dtype=F64, on=on)
    with backends.use(name):
        with pytest.raises(backends.BackendError, match=f"backend {name} .* float64"):
            affine_noise(x, k.float(), x)
        with pytest.raises(backends.BackendError, match="float64"):
            normal(cases.key(2, on), (3,), F64)
    assert affine_noise(x, k, x).dtype == F64


def test_a_forced_backend_refuses_other_devices():
    with backends.use("cpp"), pytest.raises(backends.BackendError, match="does not serve cuda"):
        backends.backend_of("cuda")


def test_environment_forces_a_backend():
    assert stdout(child(ONE_CALL, SELFNPO_BACKEND="reference")) == "12.0 reference"
    assert stdout(child(ONE_CALL, SELFNPO_BACKEND="")) == "12.0 cpp"
    assert "'cudnn' is no backend" in failure(child(ONE_CALL, SELFNPO_BACKEND="cudnn"))


def test_environment_names_a_backend_that_is_not_there():
    missing = {"without": ("selfnpo_kernels.triton",)}
    line = failure(child(ONE_CALL, SELFNPO_BACKEND="triton", **missing))
    assert "BackendError: backend triton was asked for and is not there: triton cannot be imported" in line
    code = "from selfnpo_kernels import backends\nwith backends.use('triton'): pass"
    assert "BackendError: backend triton was asked for and is not there" in failure(child(code, **missing))


def test_triton_needs_a_device_or_its_interpreter():
    code = "from selfnpo_kernels import backends\nprint(*backends.available('triton'))"
    there = torch.cuda.is_available()
    assert stdout(child(code)).startswith("True Triton kernels" if there else "False no CUDA device")
    if not there:
        assert stdout(child(code, TRITON_INTERPRET="1")).startswith("True Triton's interpreter")


def test_without_a_compiler_for_triton_s_launcher_the_reference_serves_and_says_so():
    """As in images of PyTorch that have no gcc; here it is the driver that is not there."""
    code = """
import torch
torch.cuda.is_available = lambda: True
from triton.runtime.driver import DriverConfig
def fail(self):
    raise RuntimeError("Failed to find C compiler.")
DriverConfig.active = property(fail)
from selfnpo_kernels import backends
print(backends.backend_of("cuda"))
with backends.use("triton"): pass
"""
    done = child(code)
    assert done.stdout.strip() == "reference"
    assert "fused ops on cuda: the PyTorch reference, since triton is not there: Triton cannot launch" in done.stderr
    line = failure(done)
    assert "BackendError: backend triton was asked for and is not there" in line
    assert "a C compiler and Python's headers: Failed to find C compiler." in line


def test_an_interpreter_on_a_gpu_is_a_warning():
    """A variable that was left in the environment makes each op thousands of times as slow."""
    code = "from selfnpo_kernels import backends\nprint(backends.backend_of('cuda'))"
    done = child(code, TRITON_INTERPRET="1")
    assert stdout(done) == "triton"
    assert "fused ops on cuda: triton (Triton's interpreter (TRITON_INTERPRET=1): correct and very slow)" in done.stderr


def test_without_the_extension_the_reference_serves_and_says_so():
    missing = {"without": ("selfnpo_kernels._cpp",)}
    done = child(ONE_CALL, **missing)
    assert stdout(done) == "12.0 reference"
    assert "fused ops on cpu: the PyTorch reference, since cpp is not there" in done.stderr
    assert done.stderr.count("fused ops on cpu") == 1


def test_a_required_extension_that_is_missing_is_a_failure():
    missing = {"without": ("selfnpo_kernels._cpp",)}
    line = failure(child(ONE_CALL, SELFNPO_REQUIRE_CPP="1", **missing))
    assert "BackendError: SELFNPO_REQUIRE_CPP=1, and the C++ extension is not there" in line
    assert stdout(child(ONE_CALL, SELFNPO_REQUIRE_CPP="1")) == "12.0 cpp"


def test_importing_brings_neither_triton_nor_diffusers_nor_the_trainer():
    code = """
import sys
import torch
before = set(sys.modules)
import selfnpo_kernels
brought = {name.split(".")[0] for name in set(sys.modules) - before}
print(sorted(brought - set(sys.stdlib_module_names)))
import selfnpo_kernels.ops
x = torch.ones(2, 3)
selfnpo_kernels.affine_noise(x, torch.ones(1, 2), x)
print([name for name in ("triton", "diffusers", "selfnpo_fast") if name in sys.modules])
"""
    assert stdout(child(code)) == "['selfnpo_kernels']\n[]"


@pytest.mark.parametrize(
    "first",
    [
        "import torch; import selfnpo_kernels._cpp",
        "from selfnpo_kernels import cpp; cpp.load(); cpp.load()",
        "import torch; getattr(torch.ops, 'selfnpo'); getattr(torch.ops, 'selfnpo_cpp')",
        "import selfnpo_kernels.ops, selfnpo_kernels.backends",
    ],
    ids=["extension", "loader", "torch.ops", "submodules"],
)
def test_import_order(first):
    """Every op is registered once, in any order of imports."""
    fresh = not first.startswith("import torch")
    assert stdout(child(first + "\n" + ONE_CALL, fresh=fresh)) == "12.0 cpp"


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_the_extension_takes_what_the_machine_has(capability):
    """The tests of values pass as on machines without AVX2 and without AVX-512."""
    chosen = "cpp and (3x4x5x7 or 1x2 or 257x4 or test_bits or test_integers or test_whole_runs or test_lists)"
    code = f"""
import sys
import pytest
from selfnpo_kernels import cpp
assert cpp.capability() == {capability.upper()!r}
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-k", {chosen!r}, {str(Path(__file__).parent)!r}]))
"""
    line = stdout(child(code, fresh=True, ATEN_CPU_CAPABILITY=capability)).splitlines()[-1]
    assert int(line.split(" passed")[0].split()[-1]) > 150, line


def test_first_calls_from_several_threads():
    """All threads find every op registered, even where registration is slow."""
    code = """
import threading, time
import torch
define = torch.library.Library.define
def slow(self, *arguments, **options):
    time.sleep(0.005)
    return define(self, *arguments, **options)
import selfnpo_kernels
torch.library.Library.define = slow
x, failed = torch.ones(2, 3), []
def call():
    try:
        selfnpo_kernels.affine_noise(x, torch.ones(1, 2), x)
    except BaseException as error:
        failed.append(repr(error))
threads = [threading.Thread(target=call) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(failed)
"""
    assert stdout(child(code)) == "[]"


@pytest.mark.parametrize(
    ("environment", "status"),
    [
        ({}, 0),
        ({"SELFNPO_BACKEND": "cpp"}, 0),
        ({"SELFNPO_BACKEND": "reference"}, 0),
        ({"SELFNPO_REQUIRE_CPP": "1"}, 0),
        ({"SELFNPO_BACKEND": "triton", "TRITON_INTERPRET": "1"}, 0),
        ({"SELFNPO_BACKEND": "cudnn"}, 1),
    ],
    ids=str,
)
def test_the_status_of_the_table(environment, status):
    """The status is 1 only where a backend that was asked for is not available."""
    done = child("import sys; from selfnpo_kernels.__main__ import main; sys.exit(main())", **environment)
    assert done.returncode == status, done.stdout + done.stderr


def test_the_table(tmp_path):
    """`python -m selfnpo_kernels`: a line for each backend, with the reason."""
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(KERNELS)}
    done = subprocess.run(
        [sys.executable, "-m", "selfnpo_kernels"], env=clean, capture_output=True, text=True, check=False, cwd=tmp_path
    )
    text = stdout(done)
    for name in backends.NAMES:
        assert name in text
    assert cpp.capability() in text
    assert "plain PyTorch" in text
    if not torch.cuda.is_available():
        assert "no CUDA device" in text
