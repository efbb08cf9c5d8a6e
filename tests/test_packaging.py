"""The project as it is installed: packages, wheel, sdist, console script, and nothing in anybody's way."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest needs it there

ROOT = Path(__file__).resolve().parents[1]
OPERATOR = ROOT / "kernels" / "torch-ext" / "leet_linear_attention"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    """Standard output of a command; its standard error is in the failure's message."""
    settings = os.environ | {"HF_HUB_OFFLINE": "1"} | environment
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def python(code: str, cwd: Path = ROOT, **environment: str) -> str:
    return run(sys.executable, "-c", code, cwd=cwd, **environment)


def test_every_package_is_listed() -> None:
    found = {
        ".".join(file.parent.relative_to(base).parts)
        for base, top in ((ROOT, ROOT / "leet_hf"), (OPERATOR.parent, OPERATOR))
        for file in top.rglob("__init__.py")
    }
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found | {"leet_hf.assets"}


def test_kernels_folder_does_not_shadow_the_package_kernels() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    path = Path(python("import kernels; print(kernels.__file__)", PYTHONPATH="").strip())
    assert path.name == "__init__.py" and ROOT not in path.parents


def test_operator_package_does_not_need_transformers() -> None:
    code = "import sys, leet_linear_attention; print('transformers' in sys.modules, 'triton' in sys.modules)"
    assert python(code, PYTHONPATH=str(OPERATOR.parent)).split() == ["False", "False"]


def test_importing_leet_hf_is_quick_and_names_its_version() -> None:
    code = "import sys, leet_hf; print(leet_hf.__version__, 'torch' in sys.modules)"
    assert python(code).split() == [PROJECT["project"]["version"], "False"]


def test_pytest_collects_in_a_checkout_that_is_not_installed(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in ("leet_hf", "kernels", "tests", "pyproject.toml"):
        source = ROOT / name
        skip = shutil.ignore_patterns("__pycache__")
        shutil.copytree(source, checkout / name, ignore=skip) if source.is_dir() else shutil.copy(source, checkout)
    test = "import leet_hf, leet_linear_attention as o\n\ndef test_paths():\n    print(leet_hf.__file__, o.__file__)\n"
    (checkout / "tests" / "test_paths.py").write_text(test)
    # An editable install answers imports by a finder of its own: as if there were none.
    code = (
        "import sys, pytest\n"
        "sys.meta_path = [f for f in sys.meta_path if '__editable__' not in getattr(f, '__module__', '')]\n"
        "sys.exit(pytest.main(['-q', '-s', '-n0', '-p', 'no:cacheprovider', 'tests/test_paths.py']))"
    )
    printed = python(code, cwd=checkout, PYTHONPATH="")
    assert printed.count(str(checkout)) == 2, printed


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an sdist, and a wheel made from that sdist alone."""
    folder = tmp_path_factory.mktemp("dist")
    # Of a copy, because a build leaves its own files in the source tree.
    skip = shutil.ignore_patterns(".git", "__pycache__", "build", "dist", "*.egg-info", ".*_cache", ".venv", "venv")
    source = Path(shutil.copytree(ROOT, folder / "source", ignore=skip))
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source)
    return folder


def test_sdist_and_wheel_hold_what_they_must(built: Path) -> None:
    (sdist,), (wheel,) = built.glob("*.tar.gz"), built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"leet_hf", "leet_linear_attention"}
    for file in (
        "leet_hf/py.typed",
        "leet_hf/assets/kjv.txt.xz",
        "leet_hf/assets/kjv.LICENSE.txt",
        "leet_hf/assets/kjv-minimax/model.safetensors",
        "leet_hf/assets/kjv-minimax/tokenizer.json",
        "leet_linear_attention/py.typed",
        "leet_linear_attention/triton/forward.py",
    ):
        assert file in names, file
    assert any(name.endswith("licenses/LICENSE") for name in names)
    with tarfile.open(sdist) as tar:
        inside = {name.partition("/")[2] for name in tar.getnames()}
    assert {"kernels/build.toml", "kernels/README.md", "examples/train_from_scratch.py", "tests/conftest.py"} <= inside


def test_wheel_runs_in_an_empty_environment(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    venv.create(tmp_path / "env", with_pip=False)
    bin_folder = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin")
    target = bin_folder / "python"
    run(sys.executable, "-m", "pip", "--python", target, "install", "-q", "--no-deps", "--no-index", wheel)
    site = Path(run(target, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # Dependencies come from this environment; a plain path runs no start-up files, so no editable install is seen.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    code = "import leet_hf.demo, leet_linear_attention as o; print(leet_hf.demo.shipped_model(), o.__file__)"
    printed = run(target, "-c", code, cwd=tmp_path, PYTHONPATH="").split()
    assert all(site in Path(path).parents for path in printed), printed
    assert "leet-hf" in run(bin_folder / "leet-hf", "env", cwd=tmp_path, PYTHONPATH="")
    written = run(bin_folder / "leet-hf", "demo", "--max-new-tokens", "4", "--no-modes", cwd=tmp_path, PYTHONPATH="")
    assert "the same text" in written


def test_kernels_is_a_kernel_hub_project(tmp_path: Path) -> None:
    from kernels._rust import Build

    assert {str(backend).lower() for backend in Build.open(ROOT / "kernels").general.backends} == {"cpu", "cuda"}
    variant = tmp_path / "build" / "torch-cpu"
    shutil.copytree(OPERATOR, variant, ignore=shutil.ignore_patterns("__pycache__"))
    metadata = {
        "id": "_leet_linear_attention_cpu",
        "name": "leet-linear-attention",
        "version": 1,
        "license": "Apache-2.0",
    }
    metadata |= {"python-depends": [], "backend": {"type": "cpu"}}
    (variant / "metadata.json").write_text(json.dumps(metadata))
    code = f"""
import kernels, pathlib, sys, torch
kernel = kernels.get_local_kernel(pathlib.Path({str(tmp_path)!r}), backend="cpu")
x = torch.ones(1, 3, 1, 2)
print(kernel.linear_attention(x, x, x)[0].flatten().tolist(), "leet_linear_attention" in sys.modules)
"""
    # Sums of two products of ones over 1, 2 and 3 tokens.
    assert python(code, cwd=tmp_path, PYTHONPATH="").strip() == "[2.0, 2.0, 4.0, 4.0, 6.0, 6.0] False"
