"""Maps the top-level folders to `wastenot.<folder>`; everything else stands in pyproject.toml.

A flat install would merge with packages of the registry that are called `kernels`, `moe` or `tools`.
"""

from setuptools import find_namespace_packages, setup

FLOORS = ("kernels", "parallel", "moe", "launch", "tools", "configs")

package_dir = {f"wastenot.{floor}": floor for floor in FLOORS}
packages = list(package_dir)
for floor in FLOORS:
    packages += [f"wastenot.{floor}.{name}" for name in find_namespace_packages(floor) if "__pycache__" not in name]

setup(
    packages=packages,
    package_dir=package_dir,
    package_data={
        "wastenot.configs": ["*.yaml", "*/*.yaml"],
        "wastenot.launch": ["jobs/*"],
        "wastenot.tools.report": ["page.css"],
        **{f"wastenot.{floor}": ["py.typed"] for floor in FLOORS if floor not in ("configs", "launch")},
    },
)
